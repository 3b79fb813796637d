"""The OCR demo: reads documents with the tiny base, with the tuned and with the merged model.

Runs the commands that a user would type, and prints each. Takes about six minutes on a busy core.
Writes to output/demo-ocr only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path("output/demo-ocr")
DATA, BASE = OUTPUT / "data", "sample_data/ocr/tiny-ocr"
INFER = [
    *["--dataset", str(DATA / "val.jsonl"), "--max-new-tokens", "120", "--batch-size", "40"],
    *["--no-repeat-ngram", "0", "--show-samples", "1"],
]


def run(*arguments: str) -> None:
    """Prints and runs a command of Python; one that fails ends the demo."""
    print(f"\n$ {' '.join(arguments).removeprefix('-m ')}", flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def answers(name: str) -> list[str]:
    """The flags that answer the held-out pages into a file of this name."""
    return [*INFER, "--output", str(OUTPUT / f"{name}.jsonl")]


def error_rate(name: str) -> float:
    """Character errors of the replies in percent of the characters of the labels."""
    lines = (ROOT / OUTPUT / f"{name}.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    errors = sum(distance(row["response"], row["label"]) for row in rows)
    return 100 * errors / sum(len(row["label"]) for row in rows)


def distance(one: str, other: str) -> int:
    """Characters to insert, delete or replace to make one text the other (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, start=1):
        corner, row[0] = row[0], number
        for index, wanted in enumerate(other, start=1):
            best = min(row[index] + 1, row[index - 1] + 1, corner + (character != wanted))
            corner, row[index] = row[index], best
    return row[-1]


def main() -> None:
    """Makes the pages, tunes, answers, merges, and prints the error rates of all three models."""
    started = time.perf_counter()
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    run("sample_data/ocr/pages.py", str(DATA))
    run("-m", "vlft", "infer", "--model", BASE, *answers("base"))
    run(
        *["-m", "vlft", "sft", "--model", BASE, "--output-dir", str(OUTPUT)],
        *["--dataset", str(DATA / "train.jsonl"), "--val-dataset", str(DATA / "val.jsonl")],
        *["--lora-target-modules", "ALL", "--lora-rank", "16", "--train-aligner"],
        *["--learning-rate", "3e-3", "--num-train-epochs", "12", "--logging-steps", "25"],
    )
    checkpoint = next((ROOT / OUTPUT).glob("tiny-ocr/v*/last")).resolve().relative_to(ROOT)
    tuned = ["--ckpt-dir", str(checkpoint)]
    run("-m", "vlft", "infer", *tuned, *answers("tuned"))
    run("-m", "vlft", "merge-lora", *tuned, "--output-dir", str(OUTPUT / "merged"))
    run("-m", "vlft", "infer", "--model", str(OUTPUT / "merged"), *answers("merged"))
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    rates = [f"{name} {error_rate(name):.1f}%" for name in ("base", "tuned", "merged")]
    print(f"ocr character error rate: {' -> '.join(rates)}")


if __name__ == "__main__":
    main()
