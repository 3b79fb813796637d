"""vlft's own training job on random samples: the benchmarks drive its packer, step and cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.load import Placement
from vlft.config import SftConfig
from vlft.packing.schedule import Schedule
from vlft.training.job import Job
from vlft.training.loss import PackedLoss
from vlft.training.optim import make_optimizer, make_scheduler
from vlft.training.samples import make_packer
from vlft.training.setup import join_world, learning_rate, loop_options, make_accelerator
from vlft.vision.batches import encode_all
from vlft.vision.cache import Images

if TYPE_CHECKING:
    from benchmarks.models import RandomModel
    from benchmarks.samples import Samples


def make_job(built: RandomModel, samples: Samples, tokens_per_row: int | None = None) -> Job:
    """The job of ``vlft sft`` with its defaults; a step takes all samples.

    Args:
        built: the model, which the job changes as training does.
        samples: that it trains on.
        tokens_per_row: limit of a row; by default that of the device.
    """
    device, processor = built.weight.device, samples.processor
    config = SftConfig(device=device.type, tokens_per_microbatch=tokens_per_row)
    accelerator = make_accelerator(config, Placement(device, built.weight.dtype))
    count = len(samples.samples)
    schedule = Schedule(tuple(range(count)), count, config.seed)
    options = loop_options(config, schedule)
    optimizer = make_optimizer(built.model, learning_rate(config), config.weight_decay)
    scheduler = make_scheduler(
        optimizer, config.lr_scheduler, options.total_steps, config.warmup_ratio
    )
    objective, optimizer, scheduler = accelerator.prepare(
        PackedLoss(built.model, built.family), optimizer, scheduler
    )
    train: Any = samples.samples
    return Job(
        accelerator=accelerator,
        world=join_world(accelerator, config),
        objective=objective,
        optimizer=optimizer,
        scheduler=scheduler,
        model=built.model,
        processor=processor,
        images=Images(processor),
        train=train,
        val=train[:0],
        schedule=schedule,
        packer=make_packer(config, processor, device.type),
        run=Path(),
        gather_weights=lambda: lambda _: None,
        options=options,
    )


def encode_images(job: Job, samples: Samples) -> int:
    """Encodes every image once, and has the job's rows take the features; returns how many."""
    keys = [image.key for image in samples.images]
    found = encode_all(job.model, samples.processor, samples.images, "aligned", keys)
    job.images.features = dict(found)
    job.images.stage = "aligned"
    return len(keys)
