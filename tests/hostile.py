"""Seeded damage to files, and command lines in forked processes that must bear it.

A process is forked after all imports, so that a trial takes no longer than its work. It may take
``SECONDS``, ``MEMORY`` more than it began with, and must end with exit code 0, or with one message
and exit code 2 (1 where data is damaged in a way that only the work can find).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlft.cli import app

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

SECONDS = 20
MEMORY = 2 * 2**30
# What a field is replaced with. DELETE takes it out.
DELETE = object()
VALUES = (
    None, "", "x", [], {}, [[]], -1, 0, 1, 3, 10**9, 10**30, 1.5, 1e-300, 1e300, True, False,
    float("nan"), float("inf"), "a" * 100_000, "\x1b[31m\nerror: x", "../../x", "/dev/zero",
    "\ud800", ["x"], [1, -1], {"x": 1}, [None] * 3, 64, 2**31, 2**63, "64", DELETE, DELETE,
)  # fmt: skip


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

    def faults(self, names: list[str]) -> list[str]:
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


def run(arguments: list[str], log: Path) -> Outcome:
    """Runs a command line in a forked process."""
    before = _resident()
    process = os.fork()
    if not process:
        _child(arguments, log)
    deadline = time.monotonic() + SECONDS
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
    return Outcome(code, log.read_text("utf-8", "replace"), usage.ru_maxrss * 1024 - before)


def _resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


def _child(arguments: list[str], log: Path) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace")
        torch.set_num_threads(1)
        with open("/proc/self/statm") as file:  # noqa: PTH123
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
        sys.argv = ["vlft", *arguments]
        app.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stderr.flush()
        os._exit(code)


def tree(folder: Path, without: Path | None = None) -> dict[str, str]:
    """What is in a folder: kind, rights and digest of each file by its path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if without is not None and path.is_relative_to(without):
            continue
        facts = path.lstat()
        content = str(path.readlink()) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = f"{facts.st_mode:o} {content}"
    return found


def damage(path: Path, chance: random.Random) -> str:
    """Damages a file in place; says how."""
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes]
    if path.suffix == ".json":
        kinds = [_field] * 12 + [_bytes]
    elif path.suffix == ".safetensors":
        kinds = [_header] * 3 + [_bytes]
    return chance.choice(kinds)(path, chance)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to the values in a JSON value; of long lists and objects the first few."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(items)[:40]:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with another value at a path."""
    changed = copy.deepcopy(value)
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    if new is DELETE:
        del owner[path[-1]]
    else:
        owner[path[-1]] = new
    return changed


def _field(path: Path, chance: random.Random) -> str:
    value = json.loads(path.read_bytes())
    # A depth first, so that a long vocabulary does not take all trials.
    found = places(value)
    depth = chance.choice(sorted({len(place) for place in found}))
    place = chance.choice([place for place in found if len(place) == depth])
    new = chance.choice(VALUES)
    path.write_text(json.dumps(replaced(value, place, new)))
    return f"{'.'.join(map(str, place))} = {'nothing' if new is DELETE else repr(new)[:40]}"


def _bytes(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    at = chance.randrange(max(1, min(len(content), 4000)))
    how = chance.choice(("cut", "empty", "flip", "text", "deep", "pipe", "folder", "list"))
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.write_bytes(
            {
                "cut": content[:at],
                "empty": b"",
                "flip": content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
                if content
                else b"\xff",
                "text": b"hello\n",
                "deep": b"[" * 100_000,
                "list": b"[1, 2]",
            }[how]
        )
    return f"{how} at {at}"


def _header(path: Path, chance: random.Random) -> str:
    """Changes the header of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    how = chance.choice(("dtype", "shape", "offsets", "name", "drop", "other"))
    if how == "dtype":
        header[name]["dtype"] = chance.choice(("F16", "I64", "BOOL", "F8_E4M3", "X", 3))
    elif how == "shape":
        header[name]["shape"] = chance.choice(([], [-1], [2**62, 4], header[name]["shape"][::-1]))
    elif how == "offsets":
        header[name]["data_offsets"] = chance.choice(([0, 2**60], [5, 1], ["a", "b"], None))
    elif how == "name":
        header[chance.choice(("", "x", "../x", "a" * 10_000, "\x1b[31m"))] = header.pop(name)
    elif how == "other":
        header["__metadata__"] = chance.choice(({"a": 1}, [], "x", {"vlft_base": "1:0"}))
    else:
        del header[name]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return f"{how} of {name}"
