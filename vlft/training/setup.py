"""The pieces of a run, made from its settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from vlft import console
from vlft.checkpoints.adapter import is_adapter, load_adapter
from vlft.checkpoints.load import Placement, load_model
from vlft.checkpoints.locate import ModelFolder, describe
from vlft.config import LEARNING_RATES
from vlft.distributed import World
from vlft.errors import CheckpointError, ConfigError
from vlft.families.base import keeps_dtype
from vlft.training import zero
from vlft.training.job import LoopOptions
from vlft.training.lora import LoraOptions, add_lora, train_fully
from vlft.training.samples import distinct_images
from vlft.vision.cache import Images, fill
from vlft.vision.cache_plan import plan_cache

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset
    from vlft.families.processor import Processor
    from vlft.packing.schedule import Schedule
    from vlft.vision.encode import Stage


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
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and not keeps_dtype(name, folder.family):
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
    # On a GPU ``auto`` starts with it; whether it can be left out is tried later.
    auto = placement.device.type == "cuda"
    if auto if config.gradient_checkpointing is None else config.gradient_checkpointing:
        set_checkpointing(model, on=True)
    return model, trained


def set_checkpointing(model: PreTrainedModel, *, on: bool) -> None:
    """Makes the layers compute again what the backward pass needs, or keep it."""
    # Releases of transformers differ in the name.
    new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    if on:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
        # It also makes what embeddings and towers give require gradients, which only reentrant
        # checkpointing needs: the backward pass would run through a frozen tower for nothing.
        model.disable_input_require_grads()
    else:
        getattr(model, f"{name}_disable")()


def prepare_images(
    config: SftConfig,
    model: Any,
    processor: Processor,
    data: tuple[Dataset, Dataset],
    world: World,
) -> Images:
    """Where rows get their images from: kept features, unless the tower trains."""
    if config.train_vision:
        return Images(processor)
    images = distinct_images(data, processor)
    stage: Stage = "seen" if config.train_aligner else "aligned"
    plan = world.broadcast(plan_cache(config.vision_cache, model, processor, images, stage))
    if images:
        zero.check_cache(plan, world.zero_stage)
    return fill(plan, model, processor, images, world)


def loop_options(config: SftConfig, schedule: Schedule) -> LoopOptions:
    """The loop's settings, every ``auto`` resolved."""
    total = schedule.steps_per_epoch * config.num_train_epochs
    save_steps = config.save_steps or schedule.steps_per_epoch
    return LoopOptions(
        total_steps=min(total, config.max_steps) if config.max_steps else total,
        batch_size=config.batch_size,
        max_grad_norm=config.max_grad_norm,
        save_steps=save_steps,
        eval_steps=config.eval_steps or save_steps,
        save_total_limit=config.save_total_limit,
        logging_steps=config.logging_steps,
        early_stop=config.early_stop,
    )


def make_accelerator(config: SftConfig, placement: Placement) -> Any:
    """Accelerate's Accelerator for this precision and device; it joins the other processes.

    Raises:
        ConfigError: see check_launch and zero.check.
    """
    check_launch(placement.device)
    if zero.is_asked_for():
        zero.check(config, placement)
    from accelerate import Accelerator
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    on_cpu, plugin = placement.device.type == "cpu", None
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(placement.dtype, "no")
    if zero.is_asked_for():
        # What zero.preparer makes casts: DeepSpeed would round what trains.
        precision = "no"
        plugin = zero.make_plugin(config)
        if on_cpu:
            # MemorySpec for the CPU, Accelerate would go without DeepSpeed.
            on_cpu, handlers = False, [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=on_cpu,
        deepspeed_plugin=plugin,
        log_with=None if config.report_to == "none" else config.report_to,
        # Until there is a run folder.
        project_dir=str(config.output_dir),
        # Given, so that no environment variable is asked: it would scale the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # A step is one of the scheduler's, however many processes divide it.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=handlers,
    )
    if plugin is not None:
        zero.forget_in_transformers()
    return accelerator


def join_world(accelerator: Any, config: SftConfig) -> World:
    """The processes of the run; only the first one goes on to speak."""
    sharded = accelerator.distributed_type.value == "FSDP"
    if sharded and (config.tuner == "full" or config.quantize != "none"):
        raise ConfigError(
            "shards the weights; allowed with it are --tuner lora and --quantize none",
            place="accelerate launch, distributed_type: FSDP",
            hint="use distributed_type: MULTI_GPU, where each GPU holds the whole model",
        )
    plugin = accelerator.deepspeed_plugin
    stage = 0 if plugin is None else plugin.zero_stage
    world = World(accelerator.process_index, accelerator.num_processes, sharded or stage > 0, stage)
    console.err.quiet = not world.is_rank_zero
    return world


def check_launch(device: torch.device) -> None:
    """Raises ConfigError for ways to start several processes that vlft does not know."""
    place = "accelerate launch"
    hint = "use distributed_type: MULTI_GPU, or FSDP with fsdp_version: 2; see docs/scale.md"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("found fsdp_version: 1", place=place, hint=hint)
        if device.type == "cpu":
            raise ConfigError("found FSDP on the CPU", place=place, hint="use MULTI_CPU or a GPU")


def check_tracker(name: str) -> None:
    """Raises ConfigError if the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"found {name}, which is not installed",
            place="--report-to",
            hint="pip install 'vlft[tracking]'",
        )


def learning_rate(config: SftConfig) -> float:
    """The peak rate; its default depends on the tuner."""
    return config.learning_rate or LEARNING_RATES[config.tuner]


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
