"""What all benchmarks share: common options, result files, Markdown tables."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import CLOCKS, load_average, machine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def new_parser(name: str, description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        name: of the command.
        description: of the command, its module's text.
        repeats: the default.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, choices=["cpu", "cuda"], help=f"default: {default}")
    add("--threads", type=int, help="of torch; default: its own choice")
    add("--clock", default="wall", choices=sorted(CLOCKS), help="default: wall")
    add("--repeats", type=int, default=repeats, help=f"after a warm-up; default: {repeats}")
    add("--output", type=Path, help="path without suffix; PATH.json and PATH.md are written")
    return parser


def prepare(options: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """Makes the process ready to measure.

    Returns:
        The device, and the head of the result file: machine, its load, settings.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    # What was imported stays: measuring need not look through it for garbage each time.
    gc.freeze()
    device = torch.device(options.device)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    head = {"machine": machine(device), "load_before": load_average(), "settings": settings}
    return device, head


def write(output: Path | None, content: Mapping[str, Any], table: str) -> None:
    """Writes OUTPUT.json and OUTPUT.md, if there is an output."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2)
    output.with_name(f"{output.name}.json").write_text(f"{text}\n", "utf-8")
    output.with_name(f"{output.name}.md").write_text(f"{table}\n", "utf-8")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """A table.

    Args:
        columns: their titles.
        rows: their cells.
        words: so many columns, the first ones, hold words; the others hold numbers.
    """
    rule = ["---"] * words + ["---:"] * (len(columns) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def note(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)
