"""The folder that a finished model goes into: nothing foreign is replaced, nothing half is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.errors import CheckpointError, ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence


def check_target(
    target: Path, needed: Sequence[Path], *, overwrite: bool, flag: str = "--output-dir"
) -> None:
    """Raises UsageError if the folder holds something that may not be replaced.

    Args:
        target: the output folder, resolved.
        needed: folders that the command reads; neither they nor the working folder may lie in it.
        overwrite: whether something else there may be replaced.
        flag: how the user names the target.
    """
    for kept in (*(path.resolve() for path in needed), Path.cwd()):
        if kept.is_relative_to(target):
            raise ConfigError(
                f"would replace {shown(kept)}", place=flag, hint="name another folder"
            )
    if target.is_file():
        raise CheckpointError("is a file", place=shown(target), hint=f"name a folder with {flag}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())) and not overwrite:
        raise CheckpointError(
            "the output folder is in use",
            place=shown(target),
            hint=f"name another {flag}, or add --overwrite to replace it",
        )


def new_part(target: Path) -> Path:
    """An empty folder beside the target, to be filled and then moved in."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def move_in(part: Path, target: Path) -> None:
    """Puts the finished folder in the target's place; the old one goes last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
