"""How a run ends when a step fails: what is saved or removed, and what the message says."""

from __future__ import annotations

import shutil
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vlft.checkpoints.runs import checkpoints_in
from vlft.errors import VlftError
from vlft.files import is_disk_full
from vlft.training.plots import METRICS, parse_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def failing(run: Path) -> Iterator[None]:
    """Says of a disk that fails while the block writes to the run how to go on."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if is_disk_full(error) else "correct that"
        saved = bool(checkpoints_in(run))
        going_on = f"go on with: vlft sft --resume {run}" if saved else "start again"
        raise VlftError(
            f"{error.strerror or error}" + ("; checkpoints are whole" if saved else ""),
            place=str(error.filename or run),
            hint=f"{remedy}, then {going_on}",
        ) from error


@contextmanager
def removed_if_idle(run: Path, *, writes: bool) -> Iterator[None]:
    """Removes a run folder in which the block has left neither a checkpoint nor a step's loss.

    Args:
        run: the folder.
        writes: whether this is the process that writes to it.
    """
    try:
        yield
    finally:
        if writes and not _has_stepped(run / METRICS) and not checkpoints_in(run):
            remove_run(run)


def _has_stepped(metrics: Path) -> bool:
    """Whether a run has logged a step; the validation before the first one is none."""
    if not metrics.exists():
        return False
    with metrics.open("rb") as file:
        return any((parse_metrics(line) or {}).get("step") for line in file)


def remove_run(run: Path) -> None:
    """Removes a run folder, and the folder of the model's runs if it was the only one."""
    shutil.rmtree(run, ignore_errors=True)
    with suppress(OSError):
        run.parent.rmdir()
