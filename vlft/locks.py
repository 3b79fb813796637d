"""A lock on what a command writes: one process holds it, until it ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vlft.errors import CheckpointError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Of file systems without locks, on which none is taken.
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@contextmanager
def locked(lock: Path, what: Path) -> Iterator[None]:
    """Holds a lock while the block runs.

    Args:
        lock: file that is made, and removed at the end.
        what: is written, for messages.

    Raises:
        CheckpointError: another process holds it, or there is a pipe or a device in its place.
    """
    descriptor = _take(lock, what)
    try:
        yield
    finally:
        # Removed while it is held: whoever has opened it meanwhile sees that it is not the file.
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _take(lock: Path, what: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            found = f"its lock {lock.name} is no regular file, so vlft has not made it"
            hint = "remove it, or name another output"
            raise CheckpointError(found, place=shown(what), hint=hint)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                holder = os.pread(descriptor, 100, 0).decode("utf-8", "replace").strip()
                os.close(descriptor)
                found = f"another vlft writes to it ({holder or 'no process is named'})"
                hint = "wait until it has ended, or name another output"
                raise CheckpointError(found, place=shown(what), hint=hint) from None
        if _is(lock, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is(lock: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
