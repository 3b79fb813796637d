"""The demo: reads handwritten digits with the base, with the tuned and with the merged model.

Runs the commands that a user would type, and prints each. Takes about five minutes on two cores.
Writes to output/demo only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path("sample_data/handwriting")
OUTPUT = Path("output/demo")
INFER = ["--dataset", str(DATA / "val.jsonl"), "--max-new-tokens", "8", "--batch-size", "50"]


def vlft(*arguments: str) -> None:
    """Prints and runs a command; a command that fails ends the demo."""
    print(f"\n$ vlft {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "vlft", *arguments], cwd=ROOT, check=True)


def exact_match(name: str) -> tuple[float, int]:
    """Percentage of replies that equal their label, and the number of replies."""
    lines = (ROOT / OUTPUT / f"{name}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    right = sum(row["response"] == row["label"] for row in rows)
    return 100 * right / len(rows), len(rows)


def answers(name: str) -> list[str]:
    """The flags that answer the held-out records into a file of this name."""
    return [*INFER, "--output", str(OUTPUT / f"{name}.jsonl"), "--show-samples", "2"]


def main() -> None:
    """Tunes, answers, merges, prints the exact match of all three models, and writes a report."""
    started = time.perf_counter()
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    vlft("infer", "--model", "sample_data/tiny-vl", *answers("base"))
    vlft(
        *["sft", "--dataset", str(DATA / "train.jsonl"), "--val-dataset", str(DATA / "val.jsonl")],
        *["--train-aligner", "--learning-rate", "3e-3", "--num-train-epochs", "6"],
        *["--logging-steps", "25"],
        *["--output-dir", str(OUTPUT)],
    )
    run = next((ROOT / OUTPUT).glob("tiny-vl/v*"))
    checkpoint = (run / "last").resolve().relative_to(ROOT)
    vlft("infer", "--ckpt-dir", str(checkpoint), *answers("tuned"))
    vlft("merge-lora", "--ckpt-dir", str(checkpoint), "--output-dir", str(OUTPUT / "merged"))
    vlft("infer", "--model", str(OUTPUT / "merged"), *answers("merged"))
    figures = {name: exact_match(name) for name in ("base", "tuned", "merged")}
    count = figures["base"][1]
    print(f"\n{time.perf_counter() - started:.0f} s in all; curves: {run.relative_to(ROOT)}/images")
    print(
        f"handwriting exact match: base {figures['base'][0]:.1f}% -> "
        f"tuned {figures['tuned'][0]:.1f}% -> merged {figures['merged'][0]:.1f}% "
        f"({count} held-out images)"
    )
    results = [str(OUTPUT / f"{name}.jsonl") for name in ("base", "tuned")]
    vlft("eval", "--results", *results, "--metric", "exact-match")


if __name__ == "__main__":
    main()
