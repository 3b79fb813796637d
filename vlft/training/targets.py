"""``--lora-target-modules`` -> the full names of the modules and parameters that get LoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class Targets:
    """What gets LoRA, by full name.

    Attributes:
        modules: linear layers.
        parameters: stacked weights of experts.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()


def choose_targets(
    spec: str,
    attention_inputs: Collection[str],
    language: list[str],
    experts: list[str],
    extra: Sequence[str] = (),
) -> Targets:
    """The targets that ``--lora-target-modules`` asks for.

    Args:
        spec: qkv, ALL, comma-separated names, or a regular expression.
        attention_inputs: last name components of the layers that qkv stands for.
        language: linear layers of the LLM.
        experts: stacked weights of its experts.
        extra: linear layers of other trained parts; all of them become targets.

    Raises:
        ConfigError: a name or expression that matches nothing, with what exists.
    """
    if spec == "qkv":
        chosen = [name for name in language if name.split(".")[-1] in attention_inputs]
    elif spec == "ALL":
        chosen = language + experts
    else:
        chosen = _match(spec, [*language, *extra], experts)
    modules = dict.fromkeys(name for name in (*chosen, *extra) if name not in experts)
    return Targets(tuple(modules), tuple(dict.fromkeys(n for n in chosen if n in experts)))


def _match(spec: str, linears: list[str], experts: list[str]) -> list[str]:
    """The names that end in one of the given names, or that match a regular expression.

    ``down_proj`` stands for linear layers only; ``experts`` and ``experts.down_proj`` stand for the
    stacked weights of experts.
    """
    names = linears + experts
    leaves = {name.split(".")[-1] for name in experts}
    chosen: list[str] = []
    wanted = [part.strip() for part in spec.split(",")]
    if all(PLAIN_NAME.fullmatch(part) and not part.endswith(".") for part in wanted):
        for part in wanted:
            ends = (f".{part}", *(f".{part}.{leaf}" for leaf in leaves))
            sought = names if "experts" in part else linears
            found = [name for name in sought if name == part or name.endswith(ends)]
            if not found:
                raise _no_match(part, linears, experts)
            chosen += found
        return chosen
    try:
        pattern = re.compile(spec)
    except re.error as error:
        raise ConfigError(
            f"not a regular expression: {error}", place="--lora-target-modules"
        ) from None
    chosen = [name for name in names if pattern.fullmatch(name)]
    if not chosen:
        raise _no_match(spec, linears, experts)
    return chosen


def _no_match(spec: str, linears: list[str], experts: list[str]) -> ConfigError:
    leaves = sorted({name.split(".")[-1] for name in linears})
    more = ", and experts, experts.gate_up_proj, experts.down_proj" if experts else ""
    return ConfigError(
        f"{spec!r} matches no linear layer of the trained parts",
        place="--lora-target-modules",
        hint=f"there are {', '.join(leaves)}{more}; the first is called {linears[0]}; "
        "or use qkv or ALL",
    )
