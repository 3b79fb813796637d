"""What the training loop works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch
    from torch import nn

    from vlft.data.dataset import Dataset
    from vlft.distributed import World
    from vlft.families.processor import Processor
    from vlft.packing.packer import Packer
    from vlft.packing.schedule import Schedule
    from vlft.vision.cache import Images


@dataclass(frozen=True)
class LoopOptions:
    """See the flags of the same names; every default is resolved."""

    total_steps: int
    batch_size: int
    max_grad_norm: float
    save_steps: int
    eval_steps: int
    save_total_limit: int | None
    logging_steps: int
    early_stop: int | None


@dataclass(frozen=True)
class Job:
    """All that the loop works with.

    Attributes:
        accelerator: Accelerate's; device, mixed precision, gradient scaling, trackers.
        world: that the run is divided among.
        objective: a row and its pixels -> loss sum; prepared by the accelerator.
        optimizer: likewise.
        scheduler: likewise.
        model: the module whose parameters train, for the checkpoint's state.
        processor: of the checkpoint.
        images: where rows get their images from.
        train: training samples.
        val: validation samples; may be empty.
        schedule: their order.
        packer: samples of a step -> rows.
        run: the run folder.
        gather_weights: takes adapter or weights together, in all processes; returns what puts
            them, and the run's settings, into a folder.
        options: see LoopOptions.
    """

    accelerator: Any
    world: World
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    model: nn.Module
    processor: Processor
    images: Images
    train: Dataset
    val: Dataset
    schedule: Schedule
    packer: Packer
    run: Path
    gather_weights: Callable[[], Callable[[Path], None]]
    options: LoopOptions
