"""uvicorn's server, which a signal ends once requests in flight have their answers."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn

from vlft import console

if TYPE_CHECKING:
    from collections.abc import Iterator


class Server(uvicorn.Server):
    """The server of an application.

    Args:
        app: of ASGI.
        timeout: seconds in which requests may end after the first signal.
    """

    def __init__(self, app: Any, timeout: int) -> None:
        self._timeout = timeout
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=timeout,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, not the process: uvicorn's own sends them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no such signal, and nohup ignores it.
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: ARG002
        """The first signal lets requests end, the second ends them."""
        console.err.quiet = console.err.quiet or sig == getattr(signal, "SIGHUP", None)
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        console.info(
            f"stopping: requests may end within {self._timeout} s; another Ctrl-C ends them"
        )
