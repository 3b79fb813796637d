"""A clean stop: the current step is finished and saved."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from vlft import console

if TYPE_CHECKING:
    from types import FrameType


class Interrupt:
    """The first Ctrl-C or SIGTERM requests a stop after the step, the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        """Installs the signal handlers, which only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.info("stopping after this step; press Ctrl-C again to stop at once")
