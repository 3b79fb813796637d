"""vlft's own training job on random samples: the benchmarks drive its planner, step and cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy
from accelerate.state import AcceleratorState

from vlft.checkpoints.placement import Placement
from vlft.config import LEARNING_RATES, SftConfig
from vlft.data.outline import outline
from vlft.packing.planner import Planner
from vlft.packing.schedule import Schedule
from vlft.training.accelerator import start_backend
from vlft.training.job import Job
from vlft.training.loss import PackedLoss
from vlft.training.optim import make_optimizer, make_scheduler
from vlft.training.samples import loop_options, make_planner
from vlft.vision.batches import encode_all
from vlft.vision.cache import Images

if TYPE_CHECKING:
    from benchmarks.models import RandomModel
    from benchmarks.samples import Samples
    from vlft.packing.packer import RowPlan


class _Data(list[Any]):
    """Samples with their outlines, in the place of a Dataset; each is drawn once an epoch."""

    outlines: tuple[Any, ...] = ()

    @property
    def rows(self) -> slice:
        """All samples, in the store's weights."""
        return slice(None)

    @property
    def store(self) -> SimpleNamespace:
        """The weights of the samples."""
        return SimpleNamespace(weights=numpy.ones(len(self)))

    def groups(self) -> list[str | int]:
        """For each sample its first image, or its own index if it has none."""
        keys = ([image.key for image in outline.images] for outline in self.outlines)
        return [found[0] if found else index for index, found in enumerate(keys)]


def make_job(built: RandomModel, samples: Samples, **settings: Any) -> Job:
    """The job of ``vlft sft`` with its defaults; it changes the model as training does.

    A step takes all samples. ``settings`` are those of SftConfig that differ.
    """
    # A process has one accelerator at a time, of one precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    device, processor = built.weight.device, samples.processor
    config = SftConfig(device=device.type, **settings)
    data: Any = _Data(samples.samples)
    token = processor.chat.image_token_id
    data.outlines = tuple(outline(sample, token) for sample in samples.samples)
    packer = make_planner(config, processor, data, device.type).packer
    schedule = Schedule(tuple(range(len(data))), len(data), config.seed)
    options = loop_options(config, schedule)
    backend = start_backend(config, Placement(device, built.weight.dtype))
    optimizer = make_optimizer(built.model, LEARNING_RATES["lora"], config.weight_decay)
    scheduler = make_scheduler(
        optimizer, config.lr_scheduler, options.total_steps, config.warmup_ratio
    )
    backend.prepare(PackedLoss(built.model, built.family), optimizer, scheduler)
    planner = Planner(schedule, packer, data.outlines)
    return Job(backend, Images(processor), data, _Data(), planner, options)  # type: ignore[arg-type]


def rows_of(job: Job) -> list[RowPlan]:
    """The rows of the one step."""
    return job.planner.rows(range(len(job.train)))


def encode_images(job: Job, samples: Samples) -> int:
    """Encodes every image once, and has the job's rows take the features; returns how many."""
    keys = [image.key for image in samples.images]
    model: Any = job.backend.model
    found = encode_all(model, samples.processor, samples.images, "aligned", keys)
    job.images.features = dict(found)
    job.images.stage = "aligned"
    return len(keys)
