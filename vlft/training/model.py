"""The model of a run: loaded, with what trains set to train."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._triton import has_triton

from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.runs import ADAPTER_CONFIG, is_adapter
from vlft.errors import CheckpointError, shown
from vlft.families.base import keeps_dtype
from vlft.training.lora import LoraOptions, add_lora, extra_parts, train_fully

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from vlft.checkpoints.locate import ModelFolder
    from vlft.checkpoints.placement import Placement
    from vlft.config import SftConfig
    from vlft.distributed import World

# A run of fewer steps ends before compiled layers have made up for the time that it takes.
COMPILED_STEPS = 1000


@dataclass(frozen=True)
class TunedModel:
    """A model that trains.

    Attributes:
        module: transformers' class, with LoRA layers in place if there are any.
        peft: peft's model around it; None for full tuning.
    """

    module: PreTrainedModel
    peft: Any | None = None


def prepare_model(
    config: SftConfig,
    folder: ModelFolder,
    placement: Placement,
    checkpoint: Path | None,
) -> TunedModel:
    """The model with what trains set to train: new, or as a checkpoint has it.

    Args:
        config: of the run.
        folder: of the base model.
        placement: where and how the model is held.
        checkpoint: to resume from; None starts anew.

    Raises:
        CheckpointError: the weights do not fit.
    """
    if config.tuner == "full":
        base = folder if checkpoint is None else describe(checkpoint)
        model = TunedModel(_load_for_full_tuning(config, base, placement))
    else:
        module, source = load_model(folder, placement), checkpoint or config.adapter
        if source is None:
            peft = add_lora(module, folder.family, _lora_options(config))
        elif is_adapter(source):
            peft = load_adapter(module, source, trainable=True)
        else:
            found, hint = f"no {ADAPTER_CONFIG}, or it is no file", "name a folder with an adapter"
            raise CheckpointError(found, place=shown(source), hint=hint)
        model = TunedModel(module, peft)
    if uses_checkpointing(config, placement.device):
        set_checkpointing(model.module, on=True)
    return model


def uses_checkpointing(config: SftConfig, device: torch.device) -> bool:
    """Whether a run starts with gradient checkpointing; the autotuner may switch it off."""
    if config.gradient_checkpointing is None:
        return device.type == "cuda"
    return config.gradient_checkpointing


def uses_compiler(config: SftConfig, placement: Placement, world: World, steps: int) -> bool:
    """Whether the LLM's layers are compiled, which takes about a minute on a GPU.

    On several GPUs layers are wrapped; FlexAttention is compiled by itself.
    """
    on_gpu = placement.device.type == "cuda" and placement.attn == "sdpa" and world.size == 1
    return config.compile == "auto" and on_gpu and steps >= COMPILED_STEPS and has_triton()


def set_checkpointing(model: PreTrainedModel, *, on: bool) -> None:
    """Switches gradient checkpointing of the model's layers on or off."""
    # transformers is renaming the method.
    renamed = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    if on:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
        # transformers also makes the outputs of embeddings and towers require gradients, which
        # only reentrant checkpointing needs; the backward pass would run through a frozen tower.
        model.disable_input_require_grads()
    else:
        getattr(model, f"{name}_disable")()


def _load_for_full_tuning(
    config: SftConfig, source: ModelFolder, placement: Placement
) -> PreTrainedModel:
    """The model with trained weights in float32 and frozen ones in the run's dtype."""
    full = dataclasses.replace(placement, dtype=torch.float32)
    model = load_model(source, full)
    family = source.family
    extra = extra_parts(
        family,
        aligner=config.train_aligner,
        vision=config.train_vision,
        gen_aligner=config.train_gen_aligner,
        gen_head=config.train_gen_head,
    )
    train_fully(model, family, extra)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not keeps_dtype(name, family):
            parameter.data = parameter.data.to(placement.dtype)
    return model


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
        train_gen_aligner=config.train_gen_aligner,
        train_gen_head=config.train_gen_head,
    )
