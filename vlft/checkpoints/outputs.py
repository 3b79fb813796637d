"""The output folder of a command: whole or absent, and in the place of nothing of others.

beside the target   .NAME.<random>.part   what is being written
                    .NAME.<random>.old    what is being replaced
                    .NAME.lock            who is writing
in the folder       .vlft                 lists the files that vlft wrote
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlft import __version__
from vlft.checkpoints.runs import run_of
from vlft.errors import CheckpointError, ConfigError, shown
from vlft.files import flush_folder, read_own, real_path, write_whole
from vlft.locks import locked
from vlft.schema import TEXT, TEXTS, Schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MARK = ".vlft"
_SCHEMA: Schema = {"vlft": TEXT, "files": TEXTS}


@contextmanager
def output_folder(
    target: Path, needed: Sequence[Path], *, overwrite: bool, flag: str = "--output-dir"
) -> Iterator[Path]:
    """A new folder beside the target, which takes its place when the block ends without an error.

    It is flushed to the disk first, and removed after an error.

    Args:
        target: the output folder.
        needed: folders that the command reads; neither they nor the working folder may lie in it.
        overwrite: whether an earlier output may be replaced.
        flag: names the target in messages.

    Raises:
        UsageError: the target may not be replaced, or another process writes to it.
    """
    target = real_path(target)
    _check(target, needed, overwrite=overwrite, flag=flag)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock"), target):
        _sweep(target)
        # An earlier output may have been put back.
        _check(target, needed, overwrite=overwrite, flag=flag)
        part, old = (_beside(target, kind) for kind in ("part", "old"))
        part.mkdir()
        try:
            yield part
            write_mark(part, {path.name for path in part.iterdir()})
            flush_folder(part)
            # The command may have taken hours.
            _check(target, needed, overwrite=overwrite, flag=flag)
            if target.exists():
                target.rename(old)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            _sweep(target)


def _check(target: Path, needed: Sequence[Path], *, overwrite: bool, flag: str) -> None:
    """Raises UsageError if the target is something that may not be replaced."""
    for kept in (*map(real_path, needed), Path.cwd()):
        if kept.is_relative_to(target):
            hint = "name another folder"
            raise ConfigError(f"would replace {shown(kept)}", place=flag, hint=hint)
    if run_of(target):
        hint = "name a folder beside the run"
        raise ConfigError(f"{shown(target)} is a checkpoint's name in a run", place=flag, hint=hint)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        hint = f"name a folder with {flag}"
        raise CheckpointError("not a folder", place=shown(target), hint=hint)
    found = sorted(path.name for path in target.iterdir()) if target.exists() else []
    if found and not overwrite:
        raise CheckpointError(
            "the output folder is in use",
            place=shown(target),
            hint=f"name another {flag}, or add --overwrite to replace it",
        )
    ours = {MARK, *read_mark(target)}
    if foreign := [name for name in found if name not in ours or (target / name).is_dir()]:
        raise CheckpointError(
            f"holds {', '.join(foreign[:3])}, which vlft has not written here",
            place=shown(target),
            hint=f"name another {flag}, or remove the folder yourself",
        )


def read_mark(folder: Path) -> set[str]:
    """The files in a folder that vlft wrote, by their paths in it."""
    return set(read_own(folder / MARK, _SCHEMA).get("files", ()))


def write_mark(folder: Path, files: set[str]) -> None:
    """Lists in a folder the files that vlft wrote."""
    text = json.dumps({"vlft": __version__, "files": sorted(files)}, indent=2)
    write_whole(folder / MARK, text + "\n")


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def _sweep(target: Path) -> None:
    """Removes what a kill left of earlier outputs; the lock must be held.

    A target that was moved aside, and whose successor never came, is put back.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.(part|old)")
    for path in target.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and found[1] == "old" and not target.exists():
            path.rename(target)
        elif found:
            shutil.rmtree(path, ignore_errors=True)
