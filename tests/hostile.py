"""Command lines in forked processes that must bear any damage, and what they have changed.

A process is forked after all imports, so that a trial takes no longer than its work. It may take
``SECONDS`` of the processor, ``WAIT`` by the clock and ``MEMORY`` more than it began with. It must
end with exit code 0, or with one message and exit code 2 (1 where data is damaged in a way that
only the work can find).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlft.cli import app

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

SECONDS = 10
WAIT = 240
MEMORY = 2 * 2**30
# Bytes of a file that a process may write.
LARGEST = 2**28


@dataclass(frozen=True)
class Outcome:
    """How a command line ended.

    Attributes:
        code: exit code; negative for a signal, None if it was stopped for taking too long.
        errors: what it wrote to standard error.
        memory: the most that it held beyond what it began with, in bytes.
    """

    code: int | None
    errors: str
    memory: int

    def faults(self, names: Collection[str]) -> list[str]:
        """What is wrong with it; ``names`` are those of which a refusal must hold one."""
        found = []
        if self.code is None:
            found.append("hang")
        elif self.code not in (0, 1, 2):
            found.append(f"ended with {self.code}")
        if "Traceback" in self.errors or "please report" in self.errors:
            found.append("a fault of vlft")
        if "out of memory" in self.errors or self.memory > MEMORY:
            found.append(f"memory {self.memory / 2**30:.1f} GiB")
        if any(sign in self.errors for sign in ("\x1b", "\nerror: x")):
            found.append("steers the terminal")
        if self.code in (1, 2) and not any(name in self.errors for name in names):
            found.append("does not name the file")
        return found


class Stage:
    """A folder for one trial at a time, whose content is compared before and after.

    Attributes:
        copy: what the trial damages.
        output: where the command writes.
        user: home folder, temporary files and working folder of the command.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self.copy, self.output, self.user = (home / name for name in ("copy", "output", "user"))
        self._log = home.with_name(f"{home.name}.log")

    def set_up(self, source: Path) -> None:
        """Copies the source, and empties the rest."""
        shutil.rmtree(self._home, ignore_errors=True)
        shutil.copytree(source, self.copy, symlinks=True)
        self.output.mkdir()
        for name in ("tmp", "cache", "here"):
            (self.user / name).mkdir(parents=True)

    def run(self, arguments: list[str]) -> tuple[Outcome, list[str]]:
        """Runs a command line; returns how it ended, and the paths that it changed."""
        before = tree(self._home)
        outcome = run(arguments, self._log, self.user)
        after = tree(self._home)
        return outcome, sorted(
            name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
        )


def run(arguments: list[str], log: Path, user: Path | None = None) -> Outcome:
    """Runs a command line in a forked process; its home is the folder ``user``, if one is given."""
    before = _resident()
    process = start(arguments, log, user)
    deadline = time.monotonic() + WAIT
    code = None
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            _, _, usage = os.wait4(process, 0)
            break
        time.sleep(0.002)
    if code == -signal.SIGXCPU:
        code = None
    return Outcome(code, log.read_text("utf-8", "replace"), usage.ru_maxrss * 1024 - before)


@functools.cache
def _warm() -> None:
    """Imports what every command line needs, which takes longer than most trials."""
    with contextlib.redirect_stdout(io.StringIO()):
        app.app(["--version"], standalone_mode=False)
    # Otherwise a process that collects garbage copies the pages of all that is imported.
    gc.collect()
    gc.freeze()


def start(arguments: list[str], log: Path, user: Path | None = None, largest: int = LARGEST) -> int:
    """Starts such a process, which writes no file of more than so many bytes; returns its id."""
    _warm()
    process = os.fork()
    if not process:
        _child(arguments, log, user, largest)
    return process


def _resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def _child(arguments: list[str], log: Path, user: Path | None, largest: int) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace")
        torch.set_num_threads(1)
        if user is not None:
            names = {"HOME": "", "TMPDIR": "tmp", "XDG_CACHE_HOME": "cache"}
            os.environ.update({name: str(user / folder) for name, folder in names.items()})
            tempfile.tempdir = None
            os.chdir(user / "here")
        with open("/proc/self/statm") as file:  # noqa: PTH123
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        sys.argv = ["vlft", *arguments]
        app.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)


def tree(folder: Path) -> dict[str, str]:
    """What is in a folder: kind, rights and digest of each file by its path below the folder."""
    found = {}
    for path in folder.rglob("*"):
        facts = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = f"{facts.st_mode:o} {facts.st_rdev} {content}"
    return found
