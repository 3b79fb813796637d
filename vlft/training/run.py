"""``vlft sft``: settings -> data -> model -> loop -> run folder."""

from __future__ import annotations

import dataclasses
import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState

from vlft import console
from vlft.checkpoints.adapter import adapter_tensors, save_adapter
from vlft.checkpoints.export import export_model
from vlft.checkpoints.load import Placement, resolve_placement
from vlft.checkpoints.locate import ModelFolder, locate_model
from vlft.checkpoints.runs import check_same_data, new_run_folder, write_run_config
from vlft.config import TOKENS_PER_ROW
from vlft.errors import VlftError
from vlft.models.adaptations import restore
from vlft.settings import check, to_json
from vlft.training import zero
from vlft.training.autotune import rehearse, settle
from vlft.training.job import Job
from vlft.training.loop import train
from vlft.training.loss import PackedLoss
from vlft.training.optim import make_optimizer, make_scheduler
from vlft.training.preview import introduce
from vlft.training.provenance import provenance
from vlft.training.resume import drop_later_checkpoints, resumed_config
from vlft.training.samples import load_data, make_packer, make_schedule
from vlft.training.setup import (
    check_tracker,
    join_world,
    learning_rate,
    loop_options,
    make_accelerator,
    prepare_images,
    prepare_model,
)
from vlft.training.state import Position, cut_metrics, read_state
from vlft.vision.cache import release_towers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from transformers import PreTrainedModel

    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset
    from vlft.distributed import World
    from vlft.families.processor import Processor
    from vlft.vision.cache import Images


# What a system says when a disk, or one's share of it, is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class SftResult:
    """What a run leaves.

    Attributes:
        run: the run folder.
        checkpoint: the last checkpoint.
        step: optimiser steps done.
        finished: False if it was interrupted.
        best_loss: lowest validation loss, nats per token; None without validation.
    """

    run: Path
    checkpoint: Path
    step: int
    finished: bool
    best_loss: float | None


def run_sft(config: SftConfig, explicit: Collection[str] | None = None) -> SftResult:
    """Trains and returns what was made.

    Args:
        config: all settings.
        explicit: names of those that the user wrote, for ``--resume``; None guesses.

    Raises:
        VlftError: see errors.py; bad input is a UsageError, raised before the model is loaded.
    """
    checkpoint: Path | None = None
    if config.resume is not None:
        config, checkpoint = resumed_config(check(config), explicit)
    config = _absolute(check(config))
    check_tracker(config.report_to)
    folder = locate_model(config.model, revision=config.revision, hub=config.hub)
    processor = folder.processor()
    data = load_data(config, processor)
    placement = resolve_placement(
        folder,
        dtype=config.dtype,
        device=config.device,
        quantize=config.quantize,
        attn=config.attn,
    )
    config = _resolved(config, placement)
    if checkpoint is not None:
        check_same_data(checkpoint.parent, [*config.dataset, *config.val_dataset])
    accelerator = make_accelerator(config, placement)
    try:
        setting = Setting(config, folder, processor, placement, data, checkpoint)
        world = join_world(accelerator, config)
        result = _run(setting, accelerator, world)
        # Wrappers of the model must be gone, in all processes, before what they talk through is.
        accelerator.free_memory()
        world.barrier()
        accelerator.end_training()
        return result
    finally:
        # A later run of the same process may want another precision or device.
        AcceleratorState._reset_state(reset_partial_state=True)
        console.err.quiet = False


@dataclass(frozen=True)
class Setting:
    """What a run starts from, all of it checked.

    Attributes:
        config: every ``auto`` resolved that can be before the model is there.
        folder: of the base model.
        processor: of the base model.
        placement: of the model.
        data: training and validation samples.
        checkpoint: to go on from, if any.
    """

    config: SftConfig
    folder: ModelFolder
    processor: Processor
    placement: Placement
    data: tuple[Dataset, Dataset]
    checkpoint: Path | None


def _run(setting: Setting, accelerator: Any, world: World) -> SftResult:
    config, processor, checkpoint = setting.config, setting.processor, setting.checkpoint
    torch.manual_seed(config.seed)
    model, trained = prepare_model(config, setting.folder, setting.placement, checkpoint)
    run = _new_run(setting, world) if checkpoint is None else checkpoint.parent
    if config.report_to != "none":
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.init_trackers("vlft")
    introduce(config, model, setting.folder, processor, setting.data)
    images = prepare_images(config, model, processor, setting.data, world)
    job, position = _make_job(setting, accelerator, world, model, trained, images, run)
    if images.stage != "pixels" and not world.shards_weights:
        # Only now: Accelerate has put the whole model on the device.
        release_towers(model, processor)
    if setting.placement.device.type == "cuda":
        job = _fitted(setting, job, trained)
        rehearse(job)
    if checkpoint is not None:
        world.on_rank_zero(lambda: _cut_back(run, position, config))
    try:
        position = train(job, position)
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "see to it"
        raise VlftError(
            f"{error.strerror or error}; checkpoints are whole",
            place=str(error.filename or run),
            hint=f"{remedy}, then go on with: vlft sft --resume {run}",
        ) from error
    return _close(job, position)


def _cut_back(run: Path, position: Position, config: SftConfig) -> None:
    """Removes from a run what came after the resumed position."""
    drop_later_checkpoints(run, position.step, overwrite=config.overwrite)
    cut_metrics(run, position.step)


def _make_job(
    setting: Setting,
    accelerator: Any,
    world: World,
    model: PreTrainedModel,
    trained: Any,
    images: Images,
    run: Path,
) -> tuple[Job, Position]:
    config, folder, checkpoint = setting.config, setting.folder, setting.checkpoint
    schedule = make_schedule(config, setting.data[0])
    options = loop_options(config, schedule)
    packer = make_packer(config, setting.processor, setting.placement.device.type, world.size)
    optimizer = make_optimizer(model, learning_rate(config), config.weight_decay)
    scheduler = make_scheduler(
        optimizer, config.lr_scheduler, options.total_steps, config.warmup_ratio
    )
    if checkpoint is None and not world.is_rank_zero:
        # The same model, but dropout of its own.
        torch.manual_seed(config.seed + 1009 * world.rank)
    loss = PackedLoss(model, folder.family)
    prepare = zero.preparer(accelerator, world.zero_stage, setting.placement.dtype)
    objective, optimizer, scheduler = prepare(loss, optimizer, scheduler)
    position = Position()
    if checkpoint is not None:
        # Only now: of a sharded model each process takes its part.
        position = read_state(checkpoint, optimizer, model, world)
        scheduler.load_state_dict(position.scheduler)
        # The scheduler knows the rate, but gives it to the optimiser only at its next step.
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(position.scaler)
    return Job(
        accelerator=accelerator,
        world=world,
        objective=objective,
        optimizer=optimizer,
        scheduler=scheduler,
        model=model,
        processor=images.processor,
        images=images,
        train=setting.data[0],
        val=setting.data[1],
        schedule=schedule,
        packer=packer,
        run=run,
        gather_weights=_gatherer(setting, config, model, trained, world),
        options=options,
    ), position


def _gatherer(
    setting: Setting, config: SftConfig, model: Any, trained: Any, world: World
) -> Callable[[], Callable[[Path], None]]:
    """See Job.gather_weights."""
    folder, chat = setting.folder, setting.processor.chat

    def gather() -> Callable[[Path], None]:
        with zero.gathered(model, world.zero_stage):
            tensors = adapter_tensors(trained) if config.tuner == "lora" else {}

        def write(target: Path) -> None:
            if config.tuner == "lora":
                save_adapter(trained, target, tensors)
            else:
                export_model(model, folder, target, chat, layout=folder.layout, dtype=None)
            write_run_config(target, to_json(config))

        return write

    return gather


def _fitted(setting: Setting, job: Job, trained: Any) -> Job:
    """The job with what was left to ``auto``; it is saved with the run, which resumes to it."""
    config = settle(setting.config, job)
    if config == setting.config:
        return job
    tokens = config.tokens_per_microbatch or job.packer.tokens_per_row
    job.world.on_rank_zero(lambda: write_run_config(job.run, to_json(config)))
    return dataclasses.replace(
        job,
        packer=dataclasses.replace(job.packer, tokens_per_row=tokens),
        gather_weights=_gatherer(setting, config, job.model, trained, job.world),
    )


def _new_run(setting: Setting, world: World) -> Path:
    """A run folder with settings and provenance; the first process makes it."""
    config, folder = setting.config, setting.folder
    run = Path()
    if world.is_rank_zero:
        run = new_run_folder(config.output_dir, Path(folder.name).name)
        record = provenance(folder.path, [*config.dataset, *config.val_dataset])
        (run / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        write_run_config(run, to_json(config))
    return world.broadcast(run)


def _close(job: Job, position: Position) -> SftResult:
    restore(job.model)
    checkpoint = job.run / f"checkpoint-{position.step}"
    if position.finished:
        console.info(f"done: {checkpoint}")
    else:
        console.info(f"stopped at step {position.step}; go on with: vlft sft --resume {job.run}")
    return SftResult(job.run, checkpoint, position.step, position.finished, position.best_loss)


def _resolved(config: SftConfig, placement: Placement) -> SftConfig:
    """The settings with what ``auto`` came to, so that what is saved says what was done."""
    tokens = config.tokens_per_microbatch
    return dataclasses.replace(
        config,
        # On a GPU it is found by trying, later.
        tokens_per_microbatch=tokens
        or (TOKENS_PER_ROW["cpu"] if placement.device.type == "cpu" else None),
        dtype=str(placement.dtype).removeprefix("torch."),
        learning_rate=learning_rate(config),
    )


def _absolute(config: SftConfig) -> SftConfig:
    """The settings with whole paths, so that the run can be resumed from any folder."""

    def whole(path: str) -> str:
        return str(Path(path).absolute())

    model = config.model
    return dataclasses.replace(
        config,
        model=whole(model) if model is not None and Path(model).is_dir() else model,
        dataset=tuple(map(whole, config.dataset)),
        val_dataset=tuple(map(whole, config.val_dataset)),
        image_root=None if config.image_root is None else config.image_root.absolute(),
    )
