"""Handwritten digits with questions, from the UCI set that scikit-learn carries.

    python sample_data/handwriting.py

Writes sample_data/handwriting/: 800 training records, 200 validation records, and their scans.
Each scan is 8 x 8 cells with ink from 0 to 16; it becomes an image of 8 x 8 pixels, black ink on
white, which the model's processor enlarges. A file is named after its scan's index in the set.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image
from questions import DIGIT_QUESTIONS
from sklearn.datasets import load_digits

TRAIN, VAL = 800, 200
SEED = 0


def main() -> None:
    """Writes both files and the images."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Make the handwriting task.")
    parser.add_argument("--out-dir", type=Path, default=here / "handwriting")
    out_dir = parser.parse_args().out_dir
    digits = load_digits()
    rng = random.Random(SEED)
    train, val = split([int(label) for label in digits.target], rng)
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for name, indices in (("train", train), ("val", val)):
        with (out_dir / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for index in indices:
                image = f"images/{index:04}.png"
                to_image(digits.images[index]).save(out_dir / image, optimize=True)
                record = {
                    "query": "<image>" + rng.choice(DIGIT_QUESTIONS),
                    "response": str(digits.target[index]),
                    "images": [image],
                }
                file.write(json.dumps(record) + "\n")


def split(labels: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Training and validation indices; the validation set holds every digit equally often."""
    order = list(range(len(labels)))
    rng.shuffle(order)
    val: list[int] = []
    for digit in range(10):
        val += [index for index in order if labels[index] == digit][: VAL // 10]
    held_out = set(val)
    train = [index for index in order if index not in held_out][:TRAIN]
    rng.shuffle(val)
    return train, val


def to_image(scan: np.ndarray) -> Image.Image:
    """Ink (8, 8) from 0 to 16 -> a grey image, black ink on white paper."""
    paper = np.round(255 * (1 - scan / 16)).astype(np.uint8)
    return Image.fromarray(paper)


if __name__ == "__main__":
    main()
