"""``vlft demo``: reads handwritten digits with the base, with the tuned and with the merged model.

It runs the commands that a user would type, each as a process of its own, and prints each.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.checkpoints.locate import TINY_MODEL
from vlft.checkpoints.runs import find_checkpoint
from vlft.console import out
from vlft.errors import VlftError, shown
from vlft.files import sample_folder

if TYPE_CHECKING:
    from vlft.config import DemoConfig


def run_demo(config: DemoConfig) -> None:
    """Tunes the tiny model, answers, merges, prints the exact match of all, and writes a report.

    Raises:
        VlftError: a command fails.
    """
    started = time.perf_counter()
    data, output = sample_folder("handwriting"), config.output_dir
    train, held_out = _here(data / "train.jsonl"), _here(data / "val.jsonl")
    if config.quick:
        train, held_out = f"{train}#200", f"{held_out}#50"

    def answer(name: str, *model: str) -> None:
        _vlft(
            *["infer", *model, "--dataset", held_out, "--max-new-tokens", "8"],
            *["--batch-size", "50", "--show-samples", "2", "--overwrite"],
            *["--output", str(output / f"{name}.jsonl")],
        )

    answer("base", "--model", _here(TINY_MODEL))
    _vlft(
        *["sft", "--dataset", train, "--val-dataset", held_out, "--train-aligner"],
        *["--learning-rate", "3e-3", "--num-train-epochs", "1" if config.quick else "6"],
        *["--logging-steps", "25", "--output-dir", str(output)],
    )
    runs = (output / "tiny-vl").glob("v*")
    run = max(runs, key=lambda path: path.stat().st_mtime)
    checkpoint, merged = str(find_checkpoint(run)), str(output / "merged")
    answer("tuned", "--ckpt-dir", checkpoint)
    _vlft("merge-lora", "--ckpt-dir", checkpoint, "--output-dir", merged, "--overwrite")
    answer("merged", "--model", merged)
    base, tuned, after = (_exact_match(output / f"{n}.jsonl") for n in ("base", "tuned", "merged"))
    out.print(f"\n{time.perf_counter() - started:.0f} s in all; curves: {shown(run)}/images")
    out.print(
        f"handwriting exact match: base {base[0]:.1f}% -> tuned {tuned[0]:.1f}% -> "
        f"merged {after[0]:.1f}% ({base[1]} held-out images)"
    )
    results = [str(output / f"{name}.jsonl") for name in ("base", "tuned")]
    _vlft("eval", "--results", *results, "--metric", "exact-match")


def _here(path: Path) -> str:
    """The path as a user in this folder would write it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _vlft(*arguments: str) -> None:
    """Prints and runs a command; one that fails ends the demo."""
    out.print(f"\n$ vlft {shlex.join(arguments)}", markup=False)
    out.file.flush()
    code = subprocess.run([sys.executable, "-m", "vlft", *arguments], check=False).returncode
    if code:
        hint = "its own message above says what to do"
        raise VlftError(f"vlft {arguments[0]} ended with {code}", place="vlft demo", hint=hint)


def _exact_match(path: Path) -> tuple[float, int]:
    """Percentage of replies that equal their label, and the number of replies."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return 100 * sum(row["response"] == row["label"] for row in rows) / len(rows), len(rows)
