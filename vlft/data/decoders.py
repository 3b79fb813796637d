"""What Pillow and libtiff say while they decode a file: kept for its message, not on stderr."""

from __future__ import annotations

import ctypes
import logging
import struct
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What Pillow raises for files that it cannot decode.
FAULTS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
# Not faults of a file: its size is checked, and its transparency is looked at.
EXPECTED = ("could be decompression bomb", "Palette images with Transparency expressed in bytes")


class _Heard(threading.local):
    """The lines of the file that a thread decodes; None if it decodes none."""

    lines: list[str] | None = None


class _Log(logging.Handler):
    """Gives records of Pillow's logger to the thread that listens."""

    def emit(self, record: logging.LogRecord) -> None:
        _add(record.getMessage())


class _Warnings:
    """Gives Python's warnings, and Pillow's log, to threads that listen.

    It counts these threads, as the filters of warnings are global.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listening = 0
        self._saved: Any = None
        self._log = _Log(logging.WARNING)

    def start(self) -> None:
        with self._lock:
            self._listening += 1
            if self._listening > 1:
                return
            self._saved = warnings.catch_warnings()
            self._saved.__enter__()
            # Python shows an equal warning once; here each belongs to another file.
            warnings.filterwarnings("always", module=r"PIL\.")
            warnings.showwarning = _showing(warnings.showwarning)
            logging.getLogger("PIL").addHandler(self._log)

    def stop(self) -> None:
        with self._lock:
            self._listening -= 1
            if not self._listening:
                self._saved.__exit__(None, None, None)
                logging.getLogger("PIL").removeHandler(self._log)


_heard = _Heard()
_warnings = _Warnings()


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that are said in this thread within the block, each once; stderr gets none."""
    _warnings.start()
    lines = _heard.lines = []
    try:
        yield lines
    finally:
        _heard.lines = None
        _warnings.stop()


def _add(line: str) -> None:
    lines = _heard.lines
    if lines is not None and line not in lines and not any(text in line for text in EXPECTED):
        lines.append(line)


def _showing(show: Callable[..., None]) -> Callable[..., None]:
    def showwarning(message: Any, *where: Any, **options: Any) -> None:
        if _heard.lines is None:
            show(message, *where, **options)
        else:
            _add(str(message))

    return showwarning


def _hear_libtiff() -> Any:
    """Sets libtiff's handler of messages; returns it, because libtiff keeps no reference."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)

    def handle(module: bytes | None, form: bytes, values: int) -> None:
        buffer = ctypes.create_string_buffer(500)
        libc.vsnprintf(buffer, len(buffer), form, ctypes.c_void_p(values))
        line = f"{(module or b'libtiff').decode(errors='replace')}: "
        line += buffer.value.decode(errors="replace")
        if _heard.lines is None:
            print(line, file=sys.stderr)
        else:
            _add(line)

    try:
        # The module of Pillow leads to the libtiff that it is linked with.
        libc, linked = ctypes.CDLL(None), ctypes.CDLL(Image.core.__file__)  # type: ignore[attr-defined]
        handler = kind(handle)
        linked.TIFFSetErrorHandler(handler)
        linked.TIFFSetWarningHandler(handler)
    except (AttributeError, OSError, TypeError):
        # Pillow without libtiff, or with one inside that shows no names; its lines go to stderr.
        return None
    return handler


_handler = _hear_libtiff()
