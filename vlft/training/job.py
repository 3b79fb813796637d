"""What an optimiser step works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlft.training.ahead import Ahead

if TYPE_CHECKING:
    from vlft.data.dataset import Dataset
    from vlft.evaluation.judge import Judge
    from vlft.packing.planner import Planner
    from vlft.training.backend import Backend
    from vlft.vision.cache import Images


@dataclass(frozen=True)
class LoopOptions:
    """Settings of the loop; see the flags of the same names. Every default is resolved."""

    total_steps: int
    batch_size: int
    save_steps: int
    eval_steps: int
    logging_steps: int
    early_stop: int | None


@dataclass(frozen=True)
class Job:
    """A run, ready to take steps.

    Attributes:
        backend: model, optimiser and scheduler; see training.backend.
        images: where rows get their images from.
        train: training samples.
        val: validation samples; may be empty.
        planner: the rows of every step.
        options: see LoopOptions.
        ahead: prepares the rows of the next step.
        base: folder of the base model, for messages.
        judge: answers and scores validation records, if --eval-metric asks for it.
    """

    backend: Backend
    images: Images
    train: Dataset
    val: Dataset
    planner: Planner
    options: LoopOptions
    ahead: Ahead = field(default_factory=Ahead)
    base: str = ""
    judge: Judge | None = None
