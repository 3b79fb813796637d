"""``vlft models``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.console import out
from vlft.families.registry import FAMILIES
from vlft.planning.published import PUBLISHED_MODELS

if TYPE_CHECKING:
    from vlft.config import ModelsConfig

HEADINGS = {
    "deepseek_vl": "DeepSeek-VL, one tower (SigLIP, 384 px)",
    "deepseek_vl_hybrid": "DeepSeek-VL, two towers (SAM, 1024 px; SigLIP, 384 px)",
    "deepseek_vl2": "DeepSeek-VL2 (tiles of 384 px, mixture of experts)",
    "janus": "Janus (understands images, and draws them)",
    "deepseek_ocr": "DeepSeek-OCR (documents; one page view and tiles of 640 px)",
    "deepseek_ocr2": "DeepSeek-OCR-2 (documents; one page view and tiles of 768 px)",
    "unlimited_ocr": "Unlimited-OCR (documents; DeepSeek-OCR with a sliding window over the reply)",
}
ROW = "{:<36}{:>12}{:>15}   {}"


def list_models(config: ModelsConfig) -> None:  # noqa: ARG001
    """Prints the published models by family, with what an image and a checkpoint of each is."""
    out.print(ROW.format("hub id", "parameters", "image tokens", "layouts"))
    for family in FAMILIES:
        out.print(f"\n[bold]{HEADINGS[family.name]}[/bold]")
        layouts = "both" if family.has_transformers_layout else "original"
        for known in PUBLISHED_MODELS:
            if known.family == family.name:
                least, most = known.image_tokens
                tokens = str(least) if least == most else f"{least} to {most}"
                out.print(ROW.format(known.id, f"{known.billions:.2f}e9", tokens, layouts))
    out.print(
        "\nAll of them work with vlft sft (LoRA, QLoRA in 4 bit, full), infer, merge-lora\n"
        "and convert. So does any folder whose config.json is of one of these families.\n"
        "docs/models.md has the memory that each needs, and the flags."
    )
