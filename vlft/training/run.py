"""``vlft sft``: settings -> data -> model -> loop -> run folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlft import console
from vlft.checkpoints.adapter import is_adapter, load_adapter, save_adapter
from vlft.checkpoints.export import export_model
from vlft.checkpoints.load import Placement, load_model, resolve_placement
from vlft.checkpoints.locate import ModelFolder, describe, locate_model
from vlft.checkpoints.runs import new_run_folder, write_run_config
from vlft.data.dataset import DataOptions, Dataset, load_train_and_val
from vlft.data.images import content_key
from vlft.errors import CheckpointError
from vlft.packing.schedule import Schedule
from vlft.settings import check, to_json
from vlft.training.loop import Job, LoopOptions, train
from vlft.training.lora import LoraOptions, add_lora, train_fully
from vlft.training.loss import PackedLoss
from vlft.training.optim import make_optimizer, make_scheduler
from vlft.training.provenance import provenance
from vlft.training.resume import check_same_data, drop_later_checkpoints, resumed_config
from vlft.training.show import parts_table, sample_text
from vlft.training.state import Position, cut_metrics, read_state

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedModel

    from vlft.config import SftConfig
    from vlft.families.processor import Processor

# Tokens of a row that keep a step busy without a dense mask of the row growing large.
TOKENS_PER_ROW = {"cpu": 4096, "cuda": 8192}


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
    run = _open_run(config, folder, checkpoint)
    torch.manual_seed(config.seed)
    model, trained = prepare_model(config, folder, processor, placement, checkpoint)
    _introduce(config, model, folder, processor, data)
    job, position = _make_job(
        config, folder, processor, placement, data, model, trained, run, checkpoint
    )
    if checkpoint is not None:
        drop_later_checkpoints(run, position.step, overwrite=config.overwrite)
        cut_metrics(run, position.step)
    position = train(job, position)
    return _close(job, position)


def load_data(config: SftConfig, processor: Processor) -> tuple[Dataset, Dataset]:
    """Training and validation set, every record checked."""
    options = DataOptions(
        image_tag=processor.family.image_tag,
        image_root=config.image_root,
        on_bad_sample=config.on_bad_sample,
        on_long=config.on_long,
        max_length=min(config.max_length or processor.max_length, processor.max_length),
        seed=config.seed,
    )
    return load_train_and_val(
        config.dataset,
        config.val_dataset,
        config.val_ratio,
        processor.encode_conversation,
        options,
    )


def prepare_model(
    config: SftConfig,
    folder: ModelFolder,
    processor: Processor,
    placement: Placement,
    checkpoint: Path | None,
) -> tuple[PreTrainedModel, Any]:
    """The model with what trains set to train, new or as a checkpoint has it.

    Returns:
        transformers' class, and peft's model around it (itself for a full run).
    """
    image_token_id = processor.chat.image_token_id
    if config.tuner == "full":
        # Trained weights are float32; frozen ones may be smaller.
        source = folder if checkpoint is None else describe(checkpoint)
        whole = dataclasses.replace(placement, dtype=torch.float32)
        model = load_model(source, image_token_id, whole)
        train_fully(model, folder.family, aligner=config.train_aligner, vision=config.train_vision)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(placement.dtype)
        trained: Any = model
    else:
        model = load_model(folder, image_token_id, placement)
        if checkpoint is None:
            trained = add_lora(model, folder.family, _lora_options(config))
        elif is_adapter(checkpoint):
            trained = load_adapter(model, checkpoint, trainable=True)
        else:
            raise CheckpointError("holds no adapter", place=str(checkpoint))
    if config.gradient_checkpointing or (
        config.gradient_checkpointing is None and placement.device.type == "cuda"
    ):
        # Releases of transformers differ in the name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model, trained


def loop_options(config: SftConfig, schedule: Schedule, device: torch.device) -> LoopOptions:
    """The loop's settings, every ``auto`` resolved."""
    total = schedule.steps_per_epoch * config.num_train_epochs
    save_steps = config.save_steps or schedule.steps_per_epoch
    return LoopOptions(
        total_steps=min(total, config.max_steps) if config.max_steps else total,
        batch_size=config.batch_size,
        tokens_per_row=config.tokens_per_microbatch or TOKENS_PER_ROW[device.type],
        share_prefix=config.share_prefix,
        max_grad_norm=config.max_grad_norm,
        save_steps=save_steps,
        eval_steps=config.eval_steps or save_steps,
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        early_stop=config.early_stop,
    )


def make_schedule(config: SftConfig, train_data: Dataset) -> Schedule:
    """The order of the samples: those of one picture together, unless nothing is shared."""
    groups = tuple(
        content_key(conversation.images[0].path)
        if config.share_prefix and conversation.images
        else index
        for index, conversation in enumerate(train_data.conversations)
    )
    return Schedule(groups, config.batch_size, config.seed)


def _make_job(
    config: SftConfig,
    folder: ModelFolder,
    processor: Processor,
    placement: Placement,
    data: tuple[Dataset, Dataset],
    model: PreTrainedModel,
    trained: Any,
    run: Path,
    checkpoint: Path | None,
) -> tuple[Job, Position]:
    schedule = make_schedule(config, data[0])
    options = loop_options(config, schedule, placement.device)
    accelerator = _accelerator(config, placement, run)
    optimizer = make_optimizer(model, _learning_rate(config), config.weight_decay)
    scheduler = make_scheduler(
        optimizer, config.lr_scheduler, options.total_steps, config.warmup_ratio
    )
    position = Position()
    if checkpoint is not None:
        position = read_state(checkpoint, optimizer, model)
        scheduler.load_state_dict(position.scheduler)
        # The scheduler knows the rate, but gives it to the optimiser only at its next step.
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(position.scaler)
    objective, optimizer, scheduler = accelerator.prepare(
        PackedLoss(model, folder.family), optimizer, scheduler
    )

    def write_weights(target: Path) -> None:
        if config.tuner == "lora":
            save_adapter(trained, target)
        else:
            export_model(model, folder, target, processor.chat, layout=folder.layout, dtype=None)
        write_run_config(target, to_json(config))

    return Job(
        accelerator=accelerator,
        objective=objective,
        optimizer=optimizer,
        scheduler=scheduler,
        model=model,
        processor=processor,
        train=data[0],
        val=data[1],
        schedule=schedule,
        run=run,
        write_weights=write_weights,
        options=options,
    ), position


def _accelerator(config: SftConfig, placement: Placement, run: Path) -> Any:
    from accelerate import Accelerator

    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(placement.dtype, "no")
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=placement.device.type == "cpu",
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(run),
    )
    if config.report_to != "none":
        accelerator.init_trackers("vlft")
    return accelerator


def _open_run(config: SftConfig, folder: ModelFolder, checkpoint: Path | None) -> Path:
    """The run folder: a new one with settings and provenance, or the resumed one, data checked."""
    files = [*config.dataset, *config.val_dataset]
    if checkpoint is not None:
        run = checkpoint.parent
        check_same_data(run, files)
    else:
        run = new_run_folder(config.output_dir, Path(folder.name).name)
        record = provenance(folder.path, files)
        (run / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        write_run_config(run, to_json(config))
    return run


def _introduce(
    config: SftConfig,
    model: PreTrainedModel,
    folder: ModelFolder,
    processor: Processor,
    data: tuple[Dataset, Dataset],
) -> None:
    """Shows the model by parts, the data, and one encoded sample."""
    console.info(f"{folder.family.title} from {folder.path} ({folder.layout} layout)")
    console.err.print(parts_table(model, folder.family.parts))
    console.info(f"{len(data[0])} training samples, {len(data[1])} validation samples")
    if config.show_sample:
        console.info("one encoded sample, trained tokens in green:")
        console.err.print(sample_text(data[0][0], processor))


def _close(job: Job, position: Position) -> SftResult:
    from accelerate.state import AcceleratorState

    job.accelerator.end_training()
    # A later run of the same process may want another precision or device.
    AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint = job.run / f"checkpoint-{position.step}"
    if position.finished:
        console.info(f"done: {checkpoint}")
    else:
        console.info(f"stopped at step {position.step}; go on with: vlft sft --resume {job.run}")
    return SftResult(job.run, checkpoint, position.step, position.finished, position.best_loss)


def _lora_options(config: SftConfig) -> LoraOptions:
    return LoraOptions(
        target_modules=config.lora_target_modules,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        init=config.init_lora_weights,
        train_aligner=config.train_aligner,
        train_vision=config.train_vision,
    )


def _learning_rate(config: SftConfig) -> float:
    return config.learning_rate or (1e-4 if config.tuner == "lora" else 1e-5)


def _resolved(config: SftConfig, placement: Placement) -> SftConfig:
    """The settings with what ``auto`` came to, so that what is saved says what was done."""
    return dataclasses.replace(
        config,
        dtype=str(placement.dtype).removeprefix("torch."),
        learning_rate=_learning_rate(config),
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
