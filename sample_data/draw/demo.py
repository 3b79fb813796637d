"""The drawing demo: shapes drawn by the tiny Janus, by the tuned and by the merged model.

Runs the commands that a user would type, and prints each. Takes about five minutes on two cores.
Writes to output/demo-draw only.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from shapes import classify

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = Path("output/demo-draw")
DATA, BASE = OUTPUT / "data", "sample_data/draw/tiny-janus"
DRAW = [
    *["--dataset", str(DATA / "val.jsonl"), "--batch-size", "64"],
    *["--temperature", "0", "--cfg-weight", "1.5"],
]


def run(*arguments: str) -> None:
    """Prints and runs a command of Python; one that fails ends the demo."""
    print(f"\n$ {' '.join(arguments).removeprefix('-m ')}", flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def drawings(name: str) -> list[str]:
    """The flags that draw the held-out prompts into a folder of this name."""
    return [*DRAW, "--output-dir", str(OUTPUT / name)]


def right_drawings(name: str) -> tuple[float, int]:
    """Percentage of the drawings in a folder that show what their prompt asks, and their number."""
    lines = (ROOT / DATA / "val.jsonl").read_text("utf-8").splitlines()
    right = 0
    for number, line in enumerate(lines, start=1):
        with Image.open(ROOT / OUTPUT / name / f"{number:05}-01.png") as image:
            found = classify(image)
        right += found is not None and found in json.loads(line)["query"]
    return 100 * right / len(lines), len(lines)


def main() -> None:
    """Makes the images, tunes, draws, merges, and prints how often all three models are right."""
    started = time.perf_counter()
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)
    run("sample_data/draw/shapes.py", str(DATA))
    run("-m", "vlft", "draw", "--model", BASE, *drawings("base"))
    run(
        *["-m", "vlft", "sft", "--model", BASE, "--output-dir", str(OUTPUT)],
        *["--dataset", str(DATA / "train.jsonl"), "--val-dataset", str(DATA / "val.jsonl")],
        *["--lora-target-modules", "ALL", "--lora-rank", "16"],
        *["--train-gen-aligner", "--train-gen-head"],
        *["--learning-rate", "4e-3", "--num-train-epochs", "4", "--logging-steps", "25"],
    )
    checkpoint = next((ROOT / OUTPUT).glob("tiny-janus/v*/last")).resolve().relative_to(ROOT)
    tuned = ["--ckpt-dir", str(checkpoint)]
    run("-m", "vlft", "draw", *tuned, *drawings("tuned"))
    run("-m", "vlft", "merge-lora", *tuned, "--output-dir", str(OUTPUT / "merged"))
    run("-m", "vlft", "draw", "--model", str(OUTPUT / "merged"), *drawings("merged-images"))
    scored = [str(OUTPUT / name / "drawings.jsonl") for name in ("base", "tuned")]
    run(
        *["-m", "vlft", "eval", "--results", *scored],
        *["--references", "query", "--metric", "sample_data/draw/shapes.py"],
    )
    print(f"\n{time.perf_counter() - started:.0f} s in all; sheets: {OUTPUT}/*/sheet-01.png")
    names = {"base": "base", "tuned": "tuned", "merged": "merged-images"}
    figures = {name: right_drawings(folder) for name, folder in names.items()}
    rates = " -> ".join(f"{name} {rate:.1f}%" for name, (rate, _) in figures.items())
    print(f"right drawings: {rates} ({figures['base'][1]} prompts)")


if __name__ == "__main__":
    main()
