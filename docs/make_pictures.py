"""Draws docs/images/run.svg, the terminal of a real run, and docs/images/peers.svg.

python docs/make_pictures.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
WIDTH = 120
DATA = "sample_data/handwriting"
COMMAND = (
    f"vlft sft --dataset {DATA}/train.jsonl --val-dataset {DATA}/val.jsonl",
    "--train-aligner --learning-rate 3e-3 --num-train-epochs 6 --logging-steps 50",
)
# Without fonts from the web: a reader's own font of fixed width.
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>{lines}</defs>
<rect fill="#1c1f26" x="0" y="0" width="{width}" height="{height}" rx="8"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def terminal() -> str:
    """The picture of the run, made in a folder of its own."""
    words = " ".join(COMMAND).split()
    # Colours, but no live line.
    look = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(WIDTH)}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sample_data").symlink_to(ROOT / "sample_data")
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=folder,
            env={**os.environ, **look, "XDG_CACHE_HOME": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), " \\\n    ".join(COMMAND)))
    # No path of this machine is shown.
    lines = Text.from_ansi(done.stdout.rstrip().replace(f"{ROOT}/", "")).split("\n")
    blank = [True, *(not line.plain.strip() for line in lines), True]
    for place, line in enumerate(lines, 1):
        # Finished bars of progress leave several empty lines.
        if not blank[place] or not (blank[place - 1] or blank[place + 1]):
            console.print(line)
    return console.export_svg(title="", code_format=FORMAT, unique_id="run")


if __name__ == "__main__":
    (IMAGES / "run.svg").write_text(terminal(), "utf-8")
    plot = ["benchmarks", "plot", "benchmarks/results/peers-cpu.json", "docs/images/peers.svg"]
    subprocess.run([sys.executable, "-m", *plot], cwd=ROOT, check=True)
