"""What grouping samples by image costs in learning: vlft's order against a free shuffle.

Two sets are made of the scanned digits in sample_data and trained with the same settings, seeds
and number of steps, once grouped (the default) and once with --no-share-prefix, which shuffles
freely:

q5        five questions on each of 300 digits
common    one question on each of 400 digits; all records begin with the same blank image, and the
          file is sorted by answer

python -m benchmarks quality --output benchmarks/results/quality-cpu
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import vlft
from benchmarks.command import new_parser, prepare, publish

if TYPE_CHECKING:
    from collections.abc import Iterator

DIGITS = Path(__file__).parent.parent / "sample_data" / "handwriting"
QUESTIONS = {
    "Which digit is this?": str,
    "Is it even?": lambda digit: "no" if digit % 2 else "yes",
    "Is it more than 4?": lambda digit: "yes" if digit > 4 else "no",
    "Which digit comes next?": lambda digit: str(digit + 1),
    "What is it times two?": lambda digit: str(2 * digit),
}
COLUMNS = {
    "set": "{set}",
    "order": "{order}",
    "validation losses": "{losses}",
    "mean": "{mean:.3f}",
    "steps to the same loss": "{steps_to_loss:.0f}",
    "processor seconds to it": "{seconds_to_loss:.1f}",
}


@dataclass(frozen=True)
class Curve:
    """Validation losses of a run.

    Attributes:
        losses: by step.
        seconds: processor time of the whole run without its start.
    """

    losses: dict[int, float]
    seconds: float

    @property
    def last(self) -> float:
        """The final validation loss."""
        return self.losses[max(self.losses)]

    def steps_to(self, loss: float) -> int:
        """The first evaluated step with at most this validation loss; the last one if none has."""
        return min(
            (step for step, found in self.losses.items() if found <= loss), default=max(self.losses)
        )


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("quality", __doc__, repeats=3)
    parser.add_argument("--steps", type=int, default=240, help="default: 240")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results = []
    seeds = range(options.repeats)
    for name, questions in (("q5", 5), ("common", 1)):
        with tempfile.TemporaryDirectory() as folder:
            config = make_run(Path(folder), name, questions, options.steps)
            curves = {
                order: [train(replace(config, seed=seed, share_prefix=shared)) for seed in seeds]
                for order, shared in (("grouped", True), ("free", False))
            }
        results += compare(name, curves)
    columns = {
        title.replace("{steps}", str(options.steps)): text for title, text in COLUMNS.items()
    }
    publish(options, content, columns, results)


def compare(name: str, curves: dict[str, list[Curve]]) -> Iterator[dict[str, Any]]:
    """The rows of a set. The same loss is the larger one of both orders' means."""
    goal = max(statistics.mean(curve.last for curve in found) for found in curves.values())
    for order, found in curves.items():
        steps = [curve.steps_to(goal) for curve in found]
        seconds = [
            curve.seconds * step / max(curve.losses)
            for curve, step in zip(found, steps, strict=True)
        ]
        yield {
            "set": name,
            "order": order,
            "losses": ", ".join(f"{curve.last:.3f}" for curve in found),
            "mean": statistics.mean(curve.last for curve in found),
            "steps_to_loss": statistics.mean(steps),
            "seconds_to_loss": statistics.mean(seconds),
            "curves": [curve.losses for curve in found],
        }


def make_run(folder: Path, name: str, questions: int, steps: int) -> vlft.SftConfig:
    """Writes the records of a set; returns the settings of its runs, but for seed and order."""
    blank = folder / "blank.png"
    Image.new("RGB", (64, 64), "white").save(blank)

    def records(file: str, count: int) -> list[dict[str, Any]]:
        lines = (DIGITS / file).read_text("utf-8").splitlines()[:count]
        made = []
        for record in map(json.loads, lines):
            images = [str(DIGITS / image) for image in record["images"]]
            before = [str(blank)] if name == "common" else []
            for question, answer in list(QUESTIONS.items())[:questions]:
                tags = "<image>" * len([*before, *images])
                reply = answer(int(record["response"]))
                made.append(
                    {"query": tags + question, "response": reply, "images": before + images}
                )
        return sorted(made, key=lambda row: row["response"]) if name == "common" else made

    for file, count in (("train.jsonl", 300 if questions > 1 else 400), ("val.jsonl", 100)):
        text = "".join(json.dumps(row) + "\n" for row in records(file, count))
        (folder / file).write_text(text, "utf-8")
    return vlft.SftConfig(
        dataset=(str(folder / "train.jsonl"),),
        val_dataset=(str(folder / "val.jsonl"),),
        train_aligner=True,
        learning_rate=3e-3,
        num_train_epochs=100,
        max_steps=steps,
        eval_steps=max(1, steps // 24),
        save_steps=steps,
        logging_steps=steps,
        device="cpu",
        show_sample=False,
        output_dir=folder / "runs",
    )


def train(config: vlft.SftConfig) -> Curve:
    """The validation losses of a run."""
    started = time.process_time()
    run = vlft.sft(config).run
    seconds = time.process_time() - started
    rows = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = {
        row["step"]: row["val_loss"] for row in rows if row.get("val_loss") and row["step"] > 0
    }
    return Curve(losses, seconds)
