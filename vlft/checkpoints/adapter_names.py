"""Renames the tensors of an adapter to the names of the model, and checks that all are called for.

An adapter may be trained on transformers' class, under the names of any release, or on the authors'
class, whose names the family's key map translates:

    authors' class             change    model
    layers.0.self_attn.q_proj  rename    layers.0.self_attn.q_proj
    blocks.3.attn.qkv          split     q_proj, k_proj, v_proj: the same A, a third of B each
    experts.5.up_proj          stack     block 5 of A and B of gate_up_proj, whose rank is doubled

What the configuration does not call for is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from vlft.checkpoints.export import canonical_name, nested_name
from vlft.errors import CheckpointError
from vlft.families.keymap import Match

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from torch import Tensor, nn

    from vlft.families.base import Family

PREFIX = "base_model.model."
_LORA = re.compile(r"(.+?(?:\.base_layer)*)\.(lora_\w+(?:\.\w+)?)")
# A parameter's name in the file -> the parameters of the model that it corresponds to.
Names = dict[str, Match]
# The name of a module or of a stacked weight -> its LoRA tensors by their names.
Lora = dict[str, dict[str, "Tensor"]]


@dataclass(frozen=True)
class Adapted:
    """An adapter under the names of the model.

    Attributes:
        config: a LoraConfig that calls for LoRA alone.
        lora: see Lora.
        full: parameters that were trained fully, by name.
    """

    config: Any
    lora: Lora
    full: dict[str, Tensor]


def adapt(
    model: nn.Module,
    family: Family,
    config: Any,
    saved: Collection[str],
    tensors: Mapping[str, Tensor],
) -> Adapted:
    """Translates an adapter to the names of the model.

    Args:
        model: without LoRA layers.
        family: of the model.
        config: LoraConfig of the file, but for modules_to_save.
        saved: modules_to_save.
        tensors: of the file.

    Raises:
        CheckpointError: the configuration does not call for a tensor, or the model lacks its place.
    """
    lora: Lora = {}
    other: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(PREFIX)
        if found := _LORA.fullmatch(inner):
            lora.setdefault(found[1], {})[found[2]] = tensor
        else:
            other[inner.replace(".base_layer.bias", ".bias")] = tensor
    names = _find_names(model, family, lora or [name.rpartition(".")[0] for name in other])
    # As in training, peft's matching must leave out the modules that were trained fully.
    stated = dataclasses.replace(config, modules_to_save=list(saved) or None)
    weights = {name: match for name, match in names.items() if name.endswith(".weight")}
    modules = {name.removesuffix(".weight"): match for name, match in weights.items()}
    called = {name: m for name, m in modules.items() if check_target_module_exists(stated, name)}
    _check_ranks(config, lora, {*called, *lora})
    full = _full(names, called, config, saved, other)
    if not saved and all(name == match.native[0] for name, match in names.items()):
        return Adapted(dataclasses.replace(config, bias="none"), lora, full)
    own = {name: tensors for name, tensors in lora.items() if name not in modules}
    theirs = {name: tensors for name, tensors in lora.items() if name in modules}
    refuse(theirs.keys() - called.keys(), called.keys() - theirs.keys())
    return Adapted(_config(config, called), {**own, **_rename(model, called, theirs)}, full)


def _rank(config: Any, name: str) -> int:
    """The rank that a LoraConfig gives to a module."""
    return int(config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r))


def _check_ranks(config: Any, lora: Lora, names: Iterable[str]) -> None:
    """Raises CheckpointError for a rank that no tensor has: peft would allocate it first."""
    stored = [t for tensors in lora.values() for key, t in tensors.items() if "_A" in key]
    largest = max((tensor.shape[0] for tensor in stored if tensor.dim()), default=0)
    for name in sorted(names) if stored else ():
        if (rank := _rank(config, name)) > largest:
            raise CheckpointError(
                f"has ranks up to {largest}, its adapter_config.json gives {name} the rank {rank}"
            )


def refuse(unexpected: Iterable[str], missing: Iterable[str]) -> None:
    """Raises CheckpointError if a file holds other tensors than its configuration calls for."""
    for names, verb, what, hint in (
        (unexpected, "holds", "does not call for", "take those tensors out, if they may be left"),
        (missing, "lacks", "calls for", "write or download the adapter again"),
    ):
        if found := sorted(names):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            message = f"{verb} {', '.join(found[:3])}{more}, which its adapter_config.json {what}"
            raise CheckpointError(message, hint=hint)


def _find_names(model: nn.Module, family: Family, modules: Collection[str]) -> Names:
    """The model's parameters by their names in the one scheme that has all these modules.

    The schemes are those of transformers' releases and of the authors' class.
    """
    unknown: list[str] = []
    for names in (
        _native_names(model, str),
        _native_names(model, canonical_name),
        _native_names(model, nested_name),
        _original_names(model, family),
    ):
        owners = {name[: found.start()] for name in names for found in re.finditer(r"\.", name)}
        here = [name for name in modules if re.sub(r"\.base_layer", "", name) not in owners]
        if not here:
            return names
        unknown = min(unknown or here, here, key=len)
    raise CheckpointError(
        f"is for {', '.join(sorted(unknown)[:3])}, which {family.title} does not have"
    )


def _native_names(model: nn.Module, rename: Callable[[str], str]) -> Names:
    names = [name for name, _ in model.named_parameters()]
    return {rename(name): Match(rename(name), (name,)) for name in names}


def _original_names(model: nn.Module, family: Family) -> Names:
    names: Names = {}
    for name, _ in model.named_parameters():
        experts = getattr(model.get_submodule(name.rpartition(".")[0]), "num_experts", 1)
        names.update({m.original: m for m in family.keys.from_native(name, experts)})
    return names


def _full(
    names: Names,
    called: Collection[str],
    config: Any,
    saved: Collection[str],
    found: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The parameters that were trained fully: modules_to_save, and biases if they are."""

    def is_saved(name: str) -> bool:
        owners = accumulate(name.split(".")[:-1], "{}.{}".format)
        return any(owner.endswith(tuple(saved)) for owner in owners)

    wanted = {name for name in names if is_saved(name)}
    absent = [module for module in saved if not any(f"{module}." in name for name in wanted)]
    if absent or wanted - found.keys():
        raise CheckpointError(
            f"lacks {', '.join(sorted(absent or wanted - found.keys())[:3])}, which "
            "modules_to_save of its adapter_config.json calls for"
        )
    if config.bias != "none":
        biases = (name for name in names if name.endswith(".bias"))
        wanted |= {n for n in biases if config.bias == "all" or n[: -len(".bias")] in called}
    refuse((name for name in found if name not in wanted or names[name].change == "stack"), ())
    pairs = (zip(names[n].native, names[n].to_native(t), strict=True) for n, t in found.items())
    return {native: tensor for pair in pairs for native, tensor in pair}


def _config(config: Any, called: Names) -> Any:
    """The configuration rewritten for the model's own module names."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, match in called.items():
        rank = _rank(config, name)
        key = get_pattern_key(config.alpha_pattern, name)
        count = match.part[1]
        for native in match.native:
            native = native.removesuffix(".weight")
            ranks[native] = rank * count
            # Peft divides alpha by the rank, so a larger rank needs a larger alpha.
            factor = math.sqrt(count) if config.use_rslora else count
            alphas[native] = config.alpha_pattern.get(key, config.lora_alpha) * factor
    stacked = {m.native[0] for m in called.values() if m.change == "stack"}
    return dataclasses.replace(
        config,
        target_modules=sorted(ranks.keys() - stacked) or None,
        target_parameters=sorted({*stacked, *(config.target_parameters or ())}) or None,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config.r},
        alpha_pattern={name: a for name, a in alphas.items() if a != config.lora_alpha},
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
        bias="none",
    )


def _rename(model: nn.Module, called: Names, lora: Lora) -> Lora:
    """Gives the LoRA tensors the model's names; fused layers are split, single experts stacked."""
    renamed: Lora = {}
    stacks: dict[str, list[tuple[Match, dict[str, Tensor]]]] = {}
    for name, tensors in lora.items():
        match = called[name]
        if match.change == "stack":
            stacks.setdefault(match.native[0], []).append((match, tensors))
            continue
        for index, native in enumerate(match.native):
            renamed[native.removesuffix(".weight")] = {
                key: tensor if "lora_A" in key else tensor.chunk(len(match.native))[index]
                for key, tensor in tensors.items()
            }
    for native, parts in stacks.items():
        experts: Any = model.get_submodule(native.rpartition(".")[0])
        renamed[native] = _stack(parts, experts.num_experts)
    return renamed


def _stack(parts: list[tuple[Match, dict[str, Tensor]]], experts: int) -> dict[str, Tensor]:
    """Joins A and B of single experts to those of a stacked weight, see experts.ParamWrapper."""
    match, first = parts[0]
    count = match.part[1]
    for key in first.keys() - {"lora_A.weight", "lora_B.weight"}:
        raise CheckpointError(f"holds {key} of single experts, which vlft does not read")
    (rank, inputs), rows = first["lora_A.weight"].shape, len(first["lora_B.weight"])
    a = torch.zeros(experts, count * rank, inputs)
    b = torch.zeros(experts, count * rows, count * rank)
    for match, tensors in parts:
        at = match.part[0]
        ranks, block = slice(at * rank, (at + 1) * rank), slice(at * rows, (at + 1) * rows)
        a[match.index, ranks] = tensors["lora_A.weight"].float()
        b[match.index, block, ranks] = tensors["lora_B.weight"].float()
    return {"lora_A.weight": a.flatten(0, 1), "lora_B.weight": b.permute(1, 2, 0).flatten(1)}
