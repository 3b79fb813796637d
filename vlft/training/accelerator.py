"""Settings and the launcher's environment -> the backend of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from vlft import console
from vlft.distributed import World
from vlft.errors import ConfigError
from vlft.training import deepspeed
from vlft.training.backend import Backend

if TYPE_CHECKING:
    from vlft.checkpoints.placement import Placement
    from vlft.config import SftConfig

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def start_backend(config: SftConfig, placement: Placement) -> Backend:
    """Joins the other ranks, if there are any. From here on only rank 0 prints.

    Raises:
        ConfigError: the launcher asks for what vlft does not support.
    """
    if deepspeed.is_requested():
        deepspeed.check(config, placement)
        backend = _start_deepspeed(config, placement)
    else:
        _check_fsdp(config, placement.device)
        backend = _start_accelerate(config, placement)
    console.err.quiet = not backend.world.is_rank_zero
    if config.eval_metric is not None and backend.world.sharded:
        raise ConfigError(
            "answers come from a model that each process holds as a whole, found FSDP or DeepSpeed",
            place="--eval-metric",
            hint="use distributed_type: MULTI_GPU, or score the checkpoints with vlft eval",
        )
    return backend


def _start_accelerate(config: SftConfig, placement: Placement) -> Backend:
    from accelerate.utils import DistributedDataParallelKwargs

    accelerator = _accelerator(
        config,
        mixed_precision=PRECISIONS.get(placement.dtype, "no"),
        cpu=placement.device.type == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    sharded = accelerator.distributed_type.value == "FSDP"
    world = World(accelerator.process_index, accelerator.num_processes, sharded, sharded)
    return Backend(accelerator, world, config.max_grad_norm)


def _start_deepspeed(config: SftConfig, placement: Placement) -> Backend:
    from accelerate.utils import InitProcessGroupKwargs

    on_cpu = placement.device.type == "cpu"
    accelerator = _accelerator(
        config,
        # The backend casts: DeepSpeed's own mixed precision would round what trains.
        mixed_precision="no",
        # Asked for the CPU, Accelerate would leave DeepSpeed out.
        cpu=False,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu else [],
        deepspeed_plugin=deepspeed.make_plugin(config.max_grad_norm),
    )
    deepspeed.forget_in_transformers()
    stage = accelerator.deepspeed_plugin.zero_stage
    world = World(accelerator.process_index, accelerator.num_processes, True, stage == 3)
    return deepspeed.DeepSpeedBackend(
        accelerator, world, config.max_grad_norm, stage, placement.dtype
    )


def _accelerator(config: SftConfig, **kwargs: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

    return Accelerator(
        log_with=None if config.report_to == "none" else config.report_to,
        # Replaced by the run folder once there is one.
        project_dir=str(config.output_dir),
        # Given explicitly, because Accelerate reads it from the environment otherwise and would
        # divide the loss by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # The scheduler takes one step per optimiser step, whatever the world size.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        **kwargs,
    )


def _check_fsdp(config: SftConfig, device: torch.device) -> None:
    """Raises ConfigError for what vlft does not support with FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    place = "accelerate launch, distributed_type: FSDP"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "found fsdp_version: 1",
            place=place,
            hint="use distributed_type: MULTI_GPU, or FSDP with fsdp_version: 2; see docs/scale.md",
        )
    if device.type == "cpu":
        raise ConfigError("found FSDP on the CPU", place=place, hint="use MULTI_CPU or a GPU")
    if config.tuner == "full" or config.quantize != "none":
        raise ConfigError(
            "shards the weights; allowed with it are --tuner lora and --quantize none",
            place=place,
            hint="use distributed_type: MULTI_GPU, where each GPU holds the whole model",
        )
