"""What the samples of a job look like: images, questions, lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

Bounds = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """Bounds, both included, between which a sample's numbers are drawn.

    Attributes:
        name: on the command line and in the table.
        images: of a sample, at the beginning of its first message.
        samples: on the same images.
        turns: questions and replies of a sample.
        question: tokens.
        reply: tokens; these are trained.
        image_size: pixels that the SigLIP tower sees.
        system: tokens of the prompt that all samples begin with.
    """

    name: str
    images: Bounds = (1, 1)
    samples: Bounds = (1, 1)
    turns: Bounds = (1, 1)
    question: Bounds = (20, 20)
    reply: Bounds = (24, 24)
    image_size: int = 384
    system: int = 45


def _questions(count: int) -> Bounds:
    return (count, count)


ALL = (
    *(Workload(f"q{count}", samples=_questions(count)) for count in (1, 2, 5, 10)),
    *(Workload(f"long{n}", samples=_questions(n), reply=(256, 256)) for n in (1, 5)),
    Workload("text", images=(0, 0), question=(100, 600), reply=(24, 256)),
    Workload(
        "mixed", images=(0, 2), samples=(1, 3), turns=(1, 3), question=(20, 300), reply=(8, 300)
    ),
    *(
        Workload(f"size{pixels}-q{count}", samples=_questions(count), image_size=pixels)
        for pixels in (224, 512)
        for count in (1, 5)
    ),
    *(Workload(f"reply{tokens}", reply=(tokens, tokens)) for tokens in (128, 512)),
)
WORKLOADS = {workload.name: workload for workload in ALL}

# Names of several workloads. Those of 384 pixels and replies of 24 tokens are in q1 and q5.
SWEEPS = {
    "size": ("size224-q1", "q1", "size512-q1", "size224-q5", "q5", "size512-q5"),
    "reply": ("q1", "reply128", "reply512"),
}
# What a model runs unless others are asked for; those not named here run all.
DEFAULTS = dict.fromkeys(("deepseek-vl2", "deepseek-vl-hybrid"), ("q1", "q5", "mixed"))


def chosen_workloads(model: str, names: Sequence[str] | None) -> list[Workload]:
    """The workloads of a model, each once.

    Args:
        model: its name.
        names: of workloads and sweeps; None for the model's defaults.
    """
    names = DEFAULTS.get(model, tuple(WORKLOADS)) if names is None else names
    members = [member for name in names for member in SWEEPS.get(name, (name,))]
    return [WORKLOADS[name] for name in dict.fromkeys(members)]
