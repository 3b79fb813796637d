"""DeepSpeed's ZeRO: what its engine does in its own way.

Each process keeps a part of gradients and moments (stage 2), or of the weights too (stage 3). The
engine brings gradients together in every backward pass; it clips and steps at once. Nothing else
of vlft imports DeepSpeed.
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlft.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from vlft.checkpoints.load import Placement
    from vlft.config import SftConfig
    from vlft.vision.cache_plan import CachePlan

PLACE = "accelerate launch, distributed_type: DEEPSPEED"
SEE = "see docs/scale.md"

# Of AdamW, besides the number of steps.
MOMENTS = ("exp_avg", "exp_avg_sq")

# Elements of a buffer that gradients travel in; DeepSpeed's own number takes 2 GB.
BUCKET = 2**24


def is_asked_for() -> bool:
    """Whether ``accelerate launch`` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check(config: SftConfig, placement: Placement) -> None:
    """Raises ConfigError for what vlft does not do with DeepSpeed."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed", place=PLACE, hint="pip install 'vlft[deepspeed]'"
        )
    if _asked("CONFIG_FILE", "none") != "none":
        raise ConfigError(
            f"found deepspeed_config_file: {_asked('CONFIG_FILE', 'none')}",
            place=PLACE,
            hint=f"vlft takes zero_stage alone; {SEE}",
        )
    stage = _asked("ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise ConfigError(f"found zero_stage: {stage}; 2 and 3 are allowed", place=PLACE, hint=SEE)
    for what in ("optimizer", "param"):
        if (where := _asked(f"OFFLOAD_{what.upper()}_DEVICE", "none")) != "none":
            raise ConfigError(
                f"found offload_{what}_device: {where}; none is allowed", place=PLACE, hint=SEE
            )
    if placement.device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "found --device cpu where there is a GPU, which DeepSpeed takes",
            place=PLACE,
            hint="use distributed_type: MULTI_CPU",
        )
    for refused, message in _refused(config, placement):
        if refused:
            raise ConfigError(
                f"divides what trains: {message}",
                place=PLACE,
                hint="use distributed_type: MULTI_GPU, where each GPU holds the whole model",
            )


def _asked(name: str, usual: str) -> str:
    return os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", usual)


def _refused(config: SftConfig, placement: Placement) -> Iterator[tuple[bool, str]]:
    yield config.tuner == "full", "allowed with it is --tuner lora"
    yield config.quantize != "none", "allowed with it is --quantize none"
    yield placement.dtype == torch.float16, "allowed with it are --dtype bfloat16 and float32"
    # It sums gradients in the order they come in, which a row without images would change.
    yield config.train_aligner, "it does not go with --train-aligner"
    yield config.train_vision, "it does not go with --train-vision"


def check_cache(plan: CachePlan, stage: int) -> None:
    """Raises ConfigError if towers would run in stage 3.

    A process would wait for weights that another, whose row has no images, does not ask for.
    """
    if stage == 3 and plan.where == "off":
        raise ConfigError(
            f"off ({plan.reason}); zero_stage: 3 needs features that are kept",
            place="--vision-cache",
            hint="use disk or memory, or zero_stage: 2",
        )


def make_plugin(config: SftConfig) -> Any:
    """What Accelerate is told about DeepSpeed."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=1,
        # The model is loaded whole, then divided.
        zero3_init_flag=False,
    )
    # Here: of the plugin's argument of that name a 0 is ignored, and DeepSpeed clips to 1.
    plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
    # Of no meaning to vlft, but asked for.
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    return plugin


def forget_in_transformers() -> None:
    """Keeps transformers from dividing the model while it is made."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def preparer(accelerator: Any, stage: int, dtype: torch.dtype) -> Callable[..., Any]:
    """What prepares a PackedLoss, its optimiser and its scheduler; Accelerate alone in stage 0.

    Args:
        accelerator: Accelerate's.
        stage: of ZeRO.
        dtype: to compute in.
    """
    return partial(_prepare, accelerator, stage, dtype) if stage else accelerator.prepare


def _prepare(
    accelerator: Any, stage: int, dtype: torch.dtype, objective: Any, optimizer: Any, scheduler: Any
) -> tuple[Any, Any, Any]:
    import deepspeed

    if dtype != torch.float32:
        # DeepSpeed's own ways would round trained weights, or their gradients.
        cast = torch.autocast(accelerator.device.type, dtype)
        objective.forward = cast(objective.forward)
    head = objective.model.get_submodule(objective.family.parts.head)
    engine, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)
    if stage == 3:
        # Used without a call of their module, see training.loss.
        for parameter in head.parameters():
            deepspeed.zero.register_external_parameter(objective, parameter)
    _start_moments(optimizer.optimizer, stage)
    return engine, optimizer, scheduler


def _start_moments(divided: Any, stage: int) -> None:
    """Moments at zero.

    DeepSpeed says which of them are of which parameter after the step of the first group, when
    later groups have none. So all have, before.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    moments = divided.optimizer.state
    if stage == 3:
        parts = divided.fp32_partitioned_groups_flat
    else:
        parts = divided.single_partition_of_fp32_groups
    for part in parts:
        moments[part] = {"step": torch.tensor(0.0)}
        for name in MOMENTS:
            moments[part][name] = torch.zeros_like(part, requires_grad=False)
    if stage == 2:
        for group, part in zip(divided.bit16_groups, parts, strict=True):
            lazy_init_hp_params_optimizer_state(group, part, moments)


def backward(engine: Any, loss: Tensor, *, last: bool) -> None:
    """Adds the gradients of a loss.

    Args:
        engine: prepared by Accelerate.
        loss: scalar.
        last: whether a step follows.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss)


def step(engine: Any) -> float:
    """Clips and steps; returns the gradients' norm before.

    If it is not finite, nothing is done.
    """
    engine.step()
    return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan


def forget_gradients(engine: Any) -> None:
    """Drops gradients that are not finite: a step does nothing else with them, but says so."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        engine.step()
    finally:
        logger.setLevel(level)
    if engine.was_step_applied():
        raise RuntimeError("this release of DeepSpeed steps with gradients that are not finite")


def moments_of(optimizer: Any, model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Names of parameter and moment, and the moment, whole; all processes must ask."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states = optimizer.optimizer.optimizer.state
    steps = next(iter(states.values()))["step"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for key in MOMENTS:
                yield name, key, safe_get_full_optimizer_state(parameter, key).cpu()
            yield name, "step", steps.clone()


def put_moment(optimizer: Any, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Puts this process's part of a moment in its place."""
    from deepspeed.utils import safe_set_full_optimizer_state

    if key == "step":
        # Parts hold pieces of many parameters, all of them as old.
        for state in optimizer.optimizer.optimizer.state.values():
            state["step"].copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def gathered(model: nn.Module, stage: int) -> AbstractContextManager[None]:
    """Within it, what trains is whole in each process; all must ask."""
    if stage != 3:
        return nullcontext()
    import deepspeed

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(trained)
    return context
