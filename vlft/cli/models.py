"""``vlft models``."""

from __future__ import annotations

from vlft.console import out
from vlft.planning.published import PUBLISHED_MODELS, PublishedModel

HELP = "List the models that can be tuned."

HEADINGS = {
    "deepseek_vl": "DeepSeek-VL, one tower (SigLIP, 384 px)",
    "deepseek_vl_hybrid": "DeepSeek-VL, two towers (SAM, 1024 px; SigLIP, 384 px)",
    "deepseek_vl2": "DeepSeek-VL2 (tiles of 384 px, mixture of experts)",
    "janus": "Janus (understanding images; what draws is kept, not tuned)",
}
# Families that transformers has no class for.
ONE_LAYOUT = ("deepseek_vl2",)
ROW = "{:<36}{:>12}{:>15}   {}"


def command() -> None:
    """Prints the table."""
    out.print(ROW.format("hub id", "parameters", "image tokens", "layouts"))
    for family, heading in HEADINGS.items():
        out.print(f"\n[bold]{heading}[/bold]")
        for known in PUBLISHED_MODELS:
            if known.family == family:
                out.print(ROW.format(known.id, f"{known.billions:.2f}e9", *_facts(known)))
    out.print(
        "\nAll of them: vlft sft (LoRA, QLoRA in 4 bit, full), infer, merge-lora, convert.\n"
        "A folder with such a config.json works too, whatever its sizes.\n"
        "docs/models.md has the memory that each needs, and the flags."
    )


def _facts(known: PublishedModel) -> tuple[str, str]:
    """Image tokens per image, and the layouts of the files."""
    least, most = known.image_tokens
    layouts = "original" if known.family in ONE_LAYOUT else "both"
    return str(least) if least == most else f"{least} to {most}", layouts
