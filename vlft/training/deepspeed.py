"""DeepSpeed's ZeRO behind the seam of training.backend; nothing else imports DeepSpeed.

Each rank keeps a shard of gradients and moments (stage 2), or of the weights too (stage 3). Its
engine reduces gradients in every backward pass, and clips and steps in one call.
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlft.errors import ConfigError
from vlft.training.backend import Backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from vlft.checkpoints.placement import Placement
    from vlft.config import SftConfig
    from vlft.distributed import World
    from vlft.training.loss import PackedLoss
    from vlft.vision.cache_plan import CachePlan

PLACE = "accelerate launch, distributed_type: DEEPSPEED"
SEE = "see docs/scale.md"

# AdamW's moments, besides its step count.
MOMENTS = ("exp_avg", "exp_avg_sq")

# Elements of the buffer in which gradients are reduced; DeepSpeed's default takes 2 GB.
BUCKET = 2**24


class DeepSpeedBackend(Backend):
    """Gradients and steps through DeepSpeed's engine.

    Args:
        accelerator: Accelerate's, made with ``make_plugin``.
        world: the ranks of the run.
        max_grad_norm: as in Backend.
        stage: of ZeRO, 2 or 3.
        dtype: to compute in.
    """

    def __init__(
        self,
        accelerator: Any,
        world: World,
        max_grad_norm: float,
        stage: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(accelerator, world, max_grad_norm)
        self.stage = stage
        self.dtype = dtype

    def check_cache(self, plan: CachePlan) -> None:
        """Raises ConfigError if towers, or the generator, would run in stage 3.

        A rank would wait for weights that another rank, whose row has no images, never asks for.
        """
        if self.stage == 3 and plan.stage == "codes":
            found, hint = "zero_stage: 3 does not train drawing", "use zero_stage: 2"
            raise ConfigError(found, place="response_images", hint=hint)
        if self.stage == 3 and plan.where == "off":
            raise ConfigError(
                f"off ({plan.reason}); zero_stage: 3 needs cached features",
                place="--vision-cache",
                hint="use disk or memory, or zero_stage: 2",
            )

    def prepare(self, loss: PackedLoss, optimizer: Any, scheduler: Any) -> None:
        """Takes over what trains, and starts the moments."""
        self.loss, self.model = loss, loss.model
        if self.dtype != torch.float32:
            # DeepSpeed's own mixed precision would round trained weights, or their gradients.
            cast: Any = torch.autocast(self.device.type, self.dtype)
            loss.forward = cast(loss.forward)  # type: ignore[method-assign]
        prepared = self.accelerator.prepare(loss, optimizer, scheduler)
        self.objective, self.optimizer, self.scheduler = prepared
        if self.stage == 3:
            import deepspeed

            # The loss uses the head's weights without calling the head, see training.loss.
            for parameter in loss.model.get_submodule(loss.family.parts.head).parameters():
                deepspeed.zero.register_external_parameter(loss, parameter)
        _start_moments(self._engine_optimizer, self.stage)

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """DeepSpeed reduces gradients in every backward pass."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a scalar loss."""
        engine: Any = self.objective
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss)

    def step(self) -> float:
        """Clips and steps; NaN, and nothing is done, if the gradients are not finite."""
        engine: Any = self.objective
        engine.step()
        self.scheduler.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan

    def try_gradients(self, loss: Callable[[], Tensor]) -> None:
        """Forward and backward pass; gradients of NaN, which a step drops without any update."""
        from deepspeed.utils import logger

        engine: Any = self.objective
        self.backward(loss() * math.nan, last=True)
        level = logger.level
        # DeepSpeed reports the dropped gradients as an overflow.
        logger.setLevel(logging.ERROR)
        try:
            engine.step()
        finally:
            logger.setLevel(level)
        if engine.was_step_applied():
            raise RuntimeError("this release of DeepSpeed steps with gradients that are not finite")
        self.zero_grad()

    def gathered_weights(self) -> AbstractContextManager[None]:
        """A context in which every trained weight is whole on each rank; a collective call."""
        if self.stage != 3:
            return nullcontext()
        import deepspeed

        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(trained)
        return context

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter and name, whole, on the CPU; a collective call."""
        return dict(self._moments())

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = next(iter(self._engine_optimizer.optimizer.state.values()))["step"]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for key in MOMENTS:
                    yield f"{name}:{key}", safe_get_full_optimizer_state(parameter, key).cpu()
                yield f"{name}:step", steps.clone()

    def _put_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if key == "step":
            # A flat shard holds pieces of many parameters, all with the same step count.
            for state in self._engine_optimizer.optimizer.state.values():
                state["step"].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    @property
    def _engine_optimizer(self) -> Any:
        """DeepSpeed's sharded optimiser inside of Accelerate's wrapper."""
        wrapper: Any = self.optimizer
        return wrapper.optimizer


def is_requested() -> bool:
    """Whether ``accelerate launch`` was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check(config: SftConfig, placement: Placement) -> None:
    """Raises ConfigError for what vlft does not support with DeepSpeed."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "DeepSpeed is not installed", place=PLACE, hint="pip install 'vlft[deepspeed]'"
        )
    if _requested("CONFIG_FILE", "none") != "none":
        raise ConfigError(
            f"found deepspeed_config_file: {_requested('CONFIG_FILE', 'none')}",
            place=PLACE,
            hint=f"vlft reads zero_stage alone; {SEE}",
        )
    stage = _requested("ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise ConfigError(f"found zero_stage: {stage}; 2 and 3 are allowed", place=PLACE, hint=SEE)
    for what in ("optimizer", "param"):
        if (where := _requested(f"OFFLOAD_{what.upper()}_DEVICE", "none")) != "none":
            raise ConfigError(
                f"found offload_{what}_device: {where}; none is allowed", place=PLACE, hint=SEE
            )
    if placement.device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "found --device cpu on a machine with a GPU, which DeepSpeed would use",
            place=PLACE,
            hint="use distributed_type: MULTI_CPU",
        )
    for refused, message in _refused(config, placement):
        if refused:
            raise ConfigError(
                f"shards what trains: {message}",
                place=PLACE,
                hint="use distributed_type: MULTI_GPU, where each GPU holds the whole model",
            )


def _requested(name: str, default: str) -> str:
    return os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", default)


def _refused(config: SftConfig, placement: Placement) -> Iterator[tuple[bool, str]]:
    yield config.tuner == "full", "allowed with it is --tuner lora"
    yield config.quantize != "none", "allowed with it is --quantize none"
    yield placement.dtype == torch.float16, "allowed with it are --dtype bfloat16 and float32"
    # It reduces gradients in the order they arrive, which a row without images would change.
    yield config.train_aligner, "it does not go with --train-aligner"
    yield config.train_vision, "it does not go with --train-vision"
    yield config.train_gen_aligner, "it does not go with --train-gen-aligner"
    yield config.train_gen_head, "it does not go with --train-gen-head"


def make_plugin(max_grad_norm: float) -> Any:
    """What Accelerate is told about DeepSpeed."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=1,
        # The model is loaded whole, then sharded.
        zero3_init_flag=False,
    )
    # The plugin's own argument ignores a 0, and DeepSpeed would clip to 1.
    plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
    # Unused by vlft, but required.
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    return plugin


def forget_in_transformers() -> None:
    """Keeps transformers from sharding the model while it is loaded."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _start_moments(sharded: Any, stage: int) -> None:
    """Sets all moments to zero.

    DeepSpeed maps moments to parameters after the first step of the first parameter group, when
    later groups have none yet; so all of them get theirs before.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    moments = sharded.optimizer.state
    if stage == 3:
        parts = sharded.fp32_partitioned_groups_flat
    else:
        parts = sharded.single_partition_of_fp32_groups
    for part in parts:
        moments[part] = {"step": torch.tensor(0.0)}
        for name in MOMENTS:
            moments[part][name] = torch.zeros_like(part, requires_grad=False)
    if stage == 2:
        for group, part in zip(sharded.bit16_groups, parts, strict=True):
            lazy_init_hp_params_optimizer_state(group, part, moments)
