"""A lock on what a command writes: one process holds it, until it ends, however it ends.

Windows has no such locks: two commands that write the same output are not told apart there.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import re
import stat
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

fcntl: Any = None
with suppress(ImportError):  # on Windows
    fcntl = importlib.import_module("fcntl")
# Of file systems without locks, on which none is taken.
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
# What a lock holds, and how long another process may take from making it to writing that, seconds.
_CONTENT = re.compile(rb"process \d+ on [^\n]*\n")
_PATIENCE = 1.0


@contextmanager
def locked(lock: Path, what: Path) -> Iterator[None]:
    """Holds a lock while the block runs.

    Args:
        lock: file that is made, and removed at the end.
        what: is written, for messages.

    Raises:
        CheckpointError: another process holds it, or vlft has not written what is in its place.
    """
    if fcntl is None:
        yield
        return
    descriptor = _take(lock, what)
    try:
        yield
    finally:
        # Removed while it is held: whoever has opened it meanwhile sees that it is not the file.
        if _is(lock, descriptor):
            lock.unlink()
        os.close(descriptor)


def _take(lock: Path, what: Path) -> int:
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor, is_new = _open(lock)
        with ExitStack() as opened:
            opened.callback(os.close, descriptor)
            while not hold(descriptor):
                holder = _content(descriptor).decode("utf-8", "replace").strip()
                if holder or time.monotonic() > deadline:
                    found = f"another vlft writes to it ({holder or 'no process is named'})"
                    hint = "wait until it has ended, or name another output"
                    raise CheckpointError(found, place=shown(what), hint=hint)
                time.sleep(0.01)
            if _is(lock, descriptor):
                content = _content(descriptor)
                if is_new or _CONTENT.fullmatch(content):
                    _write(lock, descriptor, is_new=is_new)
                    opened.pop_all()
                    return descriptor
                # A file without content may be that of a process which has just made it.
                if content or time.monotonic() > deadline:
                    found = f"its lock {lock.name} is no file that vlft has written"
                    hint = "remove it, or name another output"
                    raise CheckpointError(found, place=shown(what), hint=hint)
        time.sleep(0.01)


def _open(lock: Path) -> tuple[int, bool]:
    """A descriptor of the file, and whether this call has made it."""
    flags = os.O_RDWR | os.O_NOFOLLOW
    while True:
        # Its holder may make it or remove it between the two.
        with suppress(FileExistsError):
            return os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o644), True
        with suppress(FileNotFoundError):
            return os.open(lock, flags), False


def hold(descriptor: int) -> bool:
    """Takes the lock on an open file; False if another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _CANNOT_LOCK
    return True


def _content(descriptor: int) -> bytes:
    """The start of the file; that of a pipe or a device is none of vlft's."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return b"no regular file"
    return os.pread(descriptor, 400, 0)


def _write(lock: Path, descriptor: int, *, is_new: bool) -> None:
    """Has the file name this process."""
    text = f"process {os.getpid()} on {platform.node()}\n".encode()
    try:
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
    except OSError:
        if is_new:
            lock.unlink()
        raise


def _is(lock: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(lock.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
