"""LoRA layers on their targets, and the trained parts of full tuning.

LoRA (https://arxiv.org/abs/2106.09685) adds to a frozen weight W of shape (out, in) the product of
two small trained matrices:

    x ──┬── W ────────────────────────┬── y        B starts at zero, so that training starts at
        └── A (r, in) ── B (out, r) ──┘ * alpha/r  the base model; A is random, so that B can move

Targets are anchored to a part of the model: ``q_proj`` means the LLM's, never the vision tower's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from vlft.checkpoints.adapter import register_experts_layer
from vlft.checkpoints.quantize import is_quantized
from vlft.config import SftConfig
from vlft.errors import ConfigError
from vlft.families.base import is_in, keeps_dtype
from vlft.models.experts import PLAIN_EXPERTS, PROJECTIONS, Experts4bit
from vlft.settings import flag
from vlft.training.targets import Targets, choose_targets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.families.base import Family


@dataclass(frozen=True)
class LoraOptions:
    """LoRA settings; see the flags of the same names."""

    target_modules: str = SftConfig.lora_target_modules
    rank: int = SftConfig.lora_rank
    alpha: float = SftConfig.lora_alpha
    dropout: float = SftConfig.lora_dropout
    use_dora: bool = SftConfig.use_dora
    use_rslora: bool = SftConfig.use_rslora
    init: str = SftConfig.init_lora_weights
    train_aligner: bool = SftConfig.train_aligner
    train_vision: bool = SftConfig.train_vision
    train_gen_aligner: bool = SftConfig.train_gen_aligner
    train_gen_head: bool = SftConfig.train_gen_head


def add_lora(model: Any, family: Family, options: LoraOptions) -> Any:
    """Adds LoRA layers to the model, in place.

    Returns:
        peft's model around it. Only the adapter weights train; they are float32.

    Raises:
        ConfigError: a target matches nothing.
    """
    from peft import LoraConfig, get_peft_model

    targets = resolve_targets(model, family, options)
    config = LoraConfig(
        r=options.rank,
        # Other readers of adapter_config.json expect an integer where there is one.
        lora_alpha=int(options.alpha) if options.alpha.is_integer() else options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets_pattern(targets.modules) if targets.modules else None,
        target_parameters=list(targets.parameters) or None,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        init_lora_weights=True if options.init == "default" else options.init,
        task_type="CAUSAL_LM",
    )
    register_experts_layer(config)
    return get_peft_model(model, config)


def extra_parts(
    family: Family, *, aligner: bool, vision: bool, gen_aligner: bool, gen_head: bool
) -> list[str]:
    """The parts besides the LLM that are asked for, see the flags ``--train-...``.

    Raises:
        ConfigError: the family does not have one.
    """
    parts, generator = family.parts, family.generator
    found = [*(parts.aligner if aligner else ()), *(parts.vision if vision else ())]
    for name, asked in (("gen_aligner", gen_aligner), ("gen_head", gen_head)):
        if asked and generator is None:
            text = f"{family.title} does not draw images"
            raise ConfigError(text, place=flag(f"train_{name}"), hint="leave it out")
        if asked and generator is not None:
            found.append(generator.head if name == "gen_head" else generator.aligner)
    return found


def train_fully(model: nn.Module, family: Family, extra: Sequence[str]) -> None:
    """Makes the LLM and some more parts trainable, in float32."""
    trained = [family.parts.language, family.parts.head, *extra]
    for name, parameter in model.named_parameters():
        # Tensors that keep their dtype, like a router bias, only select and get no gradient.
        if is_in(name, trained) and not keeps_dtype(name, family):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def resolve_targets(model: nn.Module, family: Family, options: LoraOptions) -> Targets:
    """The full names of what gets LoRA.

    Raises:
        ConfigError: a name or expression matches nothing, or an option is not supported by LoRA on
            experts.
    """
    parts = family.parts
    language = _linears(model, [parts.language])
    experts = _experts(model, parts.language)
    more = extra_parts(
        family,
        aligner=options.train_aligner,
        vision=options.train_vision,
        gen_aligner=options.train_gen_aligner,
        gen_head=options.train_gen_head,
    )
    extra = [name for part in more for name in _linears(model, [part])]
    targets = choose_targets(
        options.target_modules, family.attention_inputs, language, experts, extra
    )
    if targets.parameters:
        _check_for_experts(options)
    return targets


def _check_for_experts(options: LoraOptions) -> None:
    """Raises ConfigError for options that peft's LoRA on parameters does not support."""
    refused = [
        (options.use_dora, "--use-dora", "--no-use-dora"),
        (options.dropout > 0, f"--lora-dropout {options.dropout}", "--lora-dropout 0"),
        (
            options.init not in ("default", "gaussian"),
            f"--init-lora-weights {options.init}",
            "default, gaussian",
        ),
    ]
    for wrong, place, allowed in refused:
        if wrong:
            raise ConfigError(
                f"not supported by LoRA on experts; allowed: {allowed}",
                place=place,
                hint="change it, or leave the experts out: --lora-target-modules qkv",
            )


def targets_pattern(names: Sequence[str]) -> str:
    """One regular expression that fully matches exactly these module names.

    Layer numbers and leaf names are grouped: ``layers.(0|1|2).self_attn.(k_proj|q_proj)``.
    """
    numbers: dict[str, set[str]] = {}
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        key = name[: found.start(1)] + "#" + name[found.end(1) :] if found else name
        numbers.setdefault(key, set()).update([found[1]] if found else [])
    leaves: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key, found_numbers in numbers.items():
        owner, _, leaf = key.rpartition(".")
        order = tuple(sorted(found_numbers, key=int))
        leaves.setdefault((owner, order), []).append(leaf)
    patterns = []
    for (owner, order), names_here in leaves.items():
        prefix = re.escape(owner).replace(r"\#", f"({'|'.join(order)})")
        patterns.append(rf"{prefix}\.({'|'.join(map(re.escape, sorted(names_here)))})")
    return "|".join(patterns)


def _linears(model: nn.Module, parts: Sequence[str]) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if is_in(name, parts) and (isinstance(module, nn.Linear) or is_quantized(module))
    ]


def _experts(model: nn.Module, language: str) -> list[str]:
    return [
        f"{name}.{projection}"
        for name, module in model.named_modules()
        if is_in(name, [language]) and isinstance(module, (*PLAIN_EXPERTS, Experts4bit))
        for projection in PROJECTIONS
    ]
