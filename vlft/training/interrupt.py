"""A clean stop: the current step is finished and saved, an evaluation is abandoned."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from vlft import console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)


class Interrupt:
    """The first Ctrl-C or SIGTERM requests a stop after the step, the second stops at once.

    So does SIGHUP, the end of a terminal or ssh connection, unless it is ignored (nohup).
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        """Installs the signal handlers, which only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in self._signals():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _signals(self) -> Iterator[int]:
        yield signal.SIGINT
        yield signal.SIGTERM
        # Windows has no such signal.
        if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
            yield HANGUP

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == HANGUP:
            # The terminal is gone: output to it fails. Shell and system may both send the signal.
            console.err.quiet = True
            self.asked = True
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.info("stopping after this step; press Ctrl-C again to stop at once")
