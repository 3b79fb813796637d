"""Digests of the data files of a run, which are compared when it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.checkpoints.runs import PROVENANCE, read_provenance
from vlft.data.specs import expand, parse_spec
from vlft.errors import CheckpointError, DataError, shown
from vlft.files import digest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def check_same_data(run: Path, data_files: Iterable[str]) -> None:
    """Raises CheckpointError if a data file has changed since the run was started."""
    before = read_provenance(run).get("data", {})
    for path, value in data_digests(data_files).items():
        if path not in before:
            raise CheckpointError(
                f"has no digest of {shown(path)}: it was not there when the run was started",
                place=shown(run / PROVENANCE),
                hint="take the file away, or start a new run",
            )
        if before[path] != value:
            raise CheckpointError(
                "the file is not the one that the run was started with",
                place=shown(path),
                hint="put the old file back, or start a new run",
            )


def data_digests(data_files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each data file by its path; what follows ``#`` is left out.

    A folder of data has one for each of its files.

    Raises:
        DataError: a file is missing.
    """
    named = [parse_spec(spec)[0] for spec in expand(list(data_files))]
    for path in named:
        if not path.exists():
            raise DataError("no such file", place=shown(path), hint="put the data file back")
    paths = [file for path in named for file in (_files_in(path) if path.is_dir() else [path])]
    return {str(path): digest(path) for path in paths}


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())
