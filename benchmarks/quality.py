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
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

import vlft
from benchmarks.command import new_parser, prepare, publish
from benchmarks.measure import CLOCKS

DIGITS = Path(__file__).parent.parent / "sample_data" / "handwriting"
QUESTIONS: dict[str, list[str]] = {
    "Which digit is this?": [str(digit) for digit in range(10)],
    "Is it even?": ["yes", "no"] * 5,
    "Is it more than 4?": ["no"] * 5 + ["yes"] * 5,
    "Which digit comes next?": [str(digit + 1) for digit in range(10)],
    "What is it times two?": [str(2 * digit) for digit in range(10)],
}
COLUMNS = {
    "set": "{set}", "order": "{order}", "validation losses": "{losses}", "mean": "{mean:.3f}",
    "steps to the same loss": "{steps_to_loss:.0f}", "seconds to it": "{seconds_to_loss:.1f}",
}  # fmt: skip

# Validation losses of a run by step.
Curve = dict[int, float]


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("quality", __doc__, repeats=3)
    parser.add_argument("--steps", type=int, default=240, help="default: 240")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results = []
    for name in ("q5", "common"):
        with tempfile.TemporaryDirectory() as folder:
            config = make_run(Path(folder), name, options.steps)
            grouped, free = config, replace(config, share_prefix=False)
            results += compare(name, {"grouped": grouped, "free": free}, options)
    publish(options, content, COLUMNS, results)


def compare(name: str, orders: dict[str, vlft.SftConfig], options: Any) -> list[dict[str, Any]]:
    """The rows of a set. The same loss is the larger one of both orders' means at the end."""
    curves = {
        order: [train(replace(config, seed=seed)) for seed in range(options.repeats)]
        for order, config in orders.items()
    }
    last = {order: [curve[max(curve)] for curve in found] for order, found in curves.items()}
    goal = max(map(mean, last.values()))
    results = []
    for order, config in orders.items():
        seconds = seconds_per_step(config, options.steps, options.clock)
        steps = mean(steps_to(goal, curve) for curve in curves[order])
        results.append({
            "set": name, "order": order, "curves": curves[order], "seconds_per_step": seconds,
            "losses": ", ".join(f"{loss:.3f}" for loss in last[order]), "mean": mean(last[order]),
            "steps_to_loss": steps, "seconds_to_loss": steps * seconds,
        })  # fmt: skip
    return results


def make_run(folder: Path, name: str, steps: int) -> vlft.SftConfig:
    """Writes the records of a set; returns the settings of its runs, but for seed and order."""
    common = name == "common"
    blank = folder / "blank.png"
    Image.new("RGB", (64, 64), "white").save(blank)
    for file, count in (("train.jsonl", 400 if common else 300), ("val.jsonl", 100)):
        rows = []
        for line in (DIGITS / file).read_text("utf-8").splitlines()[:count]:
            record = json.loads(line)
            images = [str(blank)] * common + [str(DIGITS / image) for image in record["images"]]
            for question, answers in list(QUESTIONS.items())[: 1 if common else None]:
                query, response = (
                    "<image>" * len(images) + question,
                    answers[int(record["response"])],
                )
                rows.append({"query": query, "response": response, "images": images})
        if common:
            rows.sort(key=lambda row: str(row["response"]))
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return vlft.SftConfig(
        dataset=(str(folder / "train.jsonl"),), val_dataset=(str(folder / "val.jsonl"),),
        train_aligner=True, learning_rate=3e-3, num_train_epochs=100, max_steps=steps,
        eval_steps=max(1, steps // 12), save_steps=steps, logging_steps=steps,
        vision_cache="memory", device="cpu", show_sample=False, output_dir=folder / "runs",
    )  # fmt: skip


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


def steps_to(loss: float, curve: Curve) -> int:
    """The first evaluated step with at most this validation loss; the last one if none has."""
    return min((step for step, found in curve.items() if found <= loss), default=max(curve))
