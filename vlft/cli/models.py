"""``vlft models``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.console import out
from vlft.planning.published import PUBLISHED_MODELS, PublishedModel

if TYPE_CHECKING:
    from vlft.config import ModelsConfig

HEADINGS = {
    "deepseek_vl": "DeepSeek-VL, one tower (SigLIP, 384 px)",
    "deepseek_vl_hybrid": "DeepSeek-VL, two towers (SAM, 1024 px; SigLIP, 384 px)",
    "deepseek_vl2": "DeepSeek-VL2 (tiles of 384 px, mixture of experts)",
    "janus": "Janus (image understanding; the weights for drawing are kept, not tuned)",
}
ROW = "{:<36}{:>12}{:>15}   {}"


def list_models(config: ModelsConfig) -> None:  # noqa: ARG001
    """Prints the published models by family, with what an image and a checkpoint of each is."""
    out.print(ROW.format("hub id", "parameters", "image tokens", "layouts"))
    for family, heading in HEADINGS.items():
        out.print(f"\n[bold]{heading}[/bold]")
        for known in PUBLISHED_MODELS:
            if known.family == family:
                out.print(ROW.format(known.id, f"{known.billions:.2f}e9", *_facts(known)))
    out.print(
        "\nAll of them work with vlft sft (LoRA, QLoRA in 4 bit, full), infer, merge-lora\n"
        "and convert. So does any folder whose config.json is of one of these families.\n"
        "docs/models.md has the memory that each needs, and the flags."
    )


def _facts(known: PublishedModel) -> tuple[str, str]:
    """Tokens per image, and the checkpoint layouts that exist."""
    # Imported late: the families import torch, which the help pages must not wait for.
    from vlft.families.registry import FAMILIES

    least, most = known.image_tokens
    family = next(family for family in FAMILIES if family.name == known.family)
    layouts = "both" if family.has_transformers_layout else "original"
    return str(least) if least == most else f"{least} to {most}", layouts
