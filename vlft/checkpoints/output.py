"""Output folder of a model: never one with foreign files, never half written."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.errors import CheckpointError, ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def check_target(
    target: Path, needed: Sequence[Path], *, overwrite: bool, flag: str = "--output-dir"
) -> None:
    """Raises UsageError if the folder holds something that may not be replaced.

    Args:
        target: the output folder, resolved.
        needed: folders that the command reads; neither they nor the working folder may lie in it.
        overwrite: whether other content may be replaced.
        flag: names the target in messages.
    """
    for kept in (*(path.resolve() for path in needed), Path.cwd()):
        if kept.is_relative_to(target):
            raise ConfigError(
                f"would replace {shown(kept)}", place=flag, hint="name another folder"
            )
    if target.exists() and not target.is_dir():
        raise CheckpointError("is a file", place=shown(target), hint=f"name a folder with {flag}")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(
            "the output folder is in use",
            place=shown(target),
            hint=f"name another {flag}, or add --overwrite to replace it",
        )


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, which it replaces at the end.

    The old target is deleted last. After an error what was written stays for inspection.
    """
    part, old = (target.with_name(f".{target.name}.{end}") for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
