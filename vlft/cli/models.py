"""``vlft models``."""

from __future__ import annotations

from vlft.console import out
from vlft.planning.published import KNOWN, Known

HELP = "List the models that can be tuned."

HEADINGS = {
    "deepseek_vl": "DeepSeek-VL, one tower (SigLIP, 384 px)",
    "deepseek_vl_hybrid": "DeepSeek-VL, two towers (SAM, 1024 px; SigLIP, 384 px)",
    "deepseek_vl2": "DeepSeek-VL2 (tiles of 384 px, mixture of experts)",
    "janus": "Janus (understanding images; what draws is kept, not tuned)",
}
ROW = "{:<36}{:>12}{:>15}   {}"


def command() -> None:
    """Prints the table."""
    out.print(ROW.format("hub id", "parameters", "image tokens", "layouts"))
    for family, heading in HEADINGS.items():
        out.print(f"\n[bold]{heading}[/bold]")
        for known in KNOWN:
            if known.family == family:
                out.print(ROW.format(known.id, f"{known.billions:.2f}e9", *_facts(known)))
    out.print(
        "\nAll of them: vlft sft (LoRA, QLoRA in 4 bit, full), infer, merge-lora, convert.\n"
        "A folder with such a config.json works too, whatever its sizes.\n"
        "docs/models.md has the memory that each needs, and the flags."
    )


def _facts(known: Known) -> tuple[str, str]:
    """Image tokens per image, and the layouts of the files."""
    # Imported late: the families import torch, which the help pages must not wait for.
    from vlft.families.registry import FAMILIES

    least, most = known.image_tokens
    family = next(family for family in FAMILIES if family.name == known.family)
    layouts = "both" if family.has_transformers_layout else "original"
    return str(least) if least == most else f"{least} to {most}", layouts
