"""What grouping samples by image costs in learning: vlft's order against a free shuffle.

Two sets are made of the scanned digits in sample_data and trained with the same settings, seeds
and number of steps, once grouped (the default) and once with --no-share-prefix, which shuffles
freely. Steps are timed in runs without evaluations:

q5        five questions on each of 300 digits
common    one question on each of 400 digits; all records begin with the same blank image, and the
          file is sorted by answer

python -m benchmarks quality --output benchmarks/results/quality-cpu
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

import vlft
from benchmarks.command import new_parser, prepare, publish
from benchmarks.measure import CLOCKS

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
    "seconds to it": "{seconds_to_loss:.1f}",
}

# Validation losses of a run by step.
Curve = dict[int, float]


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table.

    The same loss of a set is the larger one of the mean final losses of both orders.
    """
    parser = new_parser("quality", __doc__, repeats=3)
    parser.add_argument("--steps", type=int, default=240, help="default: 240")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results = []
    seeds = range(options.repeats)
    for name, questions in (("q5", 5), ("common", 1)):
        with tempfile.TemporaryDirectory() as folder:
            config = make_run(Path(folder), name, questions, options.steps)
            for order, shared in (("grouped", True), ("free", False)):
                ordered = replace(config, share_prefix=shared)
                curves = [train(replace(ordered, seed=seed)) for seed in seeds]
                seconds = seconds_per_step(ordered, options.steps, options.clock)
                results.append({"set": name, "order": order, "curves": curves, "seconds": seconds})
        goal = max(statistics.mean(map(last, row["curves"])) for row in results[-2:])
        for row in results[-2:]:
            steps = [steps_to(goal, curve) for curve in row["curves"]]
            row |= {
                "losses": ", ".join(f"{last(curve):.3f}" for curve in row["curves"]),
                "mean": statistics.mean(map(last, row["curves"])),
                "steps_to_loss": statistics.mean(steps),
                "seconds_to_loss": statistics.mean(steps) * row["seconds"],
            }
    publish(options, content, COLUMNS, results)


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
        eval_steps=max(1, steps // 12),
        save_steps=steps,
        logging_steps=steps,
        vision_cache="memory",
        device="cpu",
        show_sample=False,
        output_dir=folder / "runs",
    )


def train(config: vlft.SftConfig) -> Curve:
    """The validation losses of a run, without that of the untrained model."""
    metrics = vlft.sft(config).run / "metrics.jsonl"
    rows = map(json.loads, metrics.read_text("utf-8").splitlines())
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row and row["step"]}


def seconds_per_step(config: vlft.SftConfig, steps: int, clock: str) -> float:
    """Seconds of a step without evaluations, from a run of these steps less a run of one step."""
    config = replace(config, val_dataset=(), val_ratio=0.0, eval_steps=None)
    seconds = []
    for length in (1, steps):
        started = CLOCKS[clock]()
        vlft.sft(replace(config, max_steps=length))
        seconds.append(CLOCKS[clock]() - started)
    return (seconds[1] - seconds[0]) / (steps - 1)


def last(curve: Curve) -> float:
    """The final validation loss."""
    return curve[max(curve)]


def steps_to(loss: float, curve: Curve) -> int:
    """The first evaluated step with at most this validation loss; the last one if none has."""
    return min((step for step, found in curve.items() if found <= loss), default=max(curve))
