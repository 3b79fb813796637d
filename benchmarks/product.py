"""``vlft sft`` and ``vlft infer`` themselves, on a folder with a published model's true shapes.

Each command is a process of its own, on data files with images. Told are the seconds from its start
to step one, of a step after that, and the share of these seconds in which the GPU computed, as
nvidia-smi says; images encoded per second; and replies per second in batches of eight.

    python -m benchmarks product --output benchmarks/results/gpu-command
    python -m benchmarks product --device cpu --scale tiny
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image

from benchmarks.command import markdown, new_parser, prepare, record
from benchmarks.step import TESTED, model_folder

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

QUESTIONS = {"q1": 1, "q5": 5}
STEP = re.compile(r"step (\d+)/(\d+)")
IMAGES = re.compile(r"([\d,.]+) images/s")
COLUMNS = {
    "model": "{model}", "data": "{workload}", "command": "`vlft {command}`",
    "s to step one": "{start:.1f}", "s a step": "{seconds:.3f}", "GPU busy": "{busy:.2f}",
    "images/s": "{images_per_second:.1f}", "replies/s": "{replies_per_second:.2f}",
    "note": "{note}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files after every command, prints the table."""
    parser = new_parser("product", __doc__, repeats=1)
    add = parser.add_argument
    add("--models", nargs="+", default=["1.3b", "7b"], choices=list(TESTED))
    add("--workloads", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    add("--scale", default="true", choices=("true", "tiny"), help="tiny: golden checkpoints")
    add("--images", type=int, default=64, help="distinct ones; default: 64")
    add("--steps", type=int, default=40, help="of a run, 16 samples each; default: 40")
    add("--quantize", default="none", choices=("none", "nf4", "int8"), help="default: none")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            path = model_folder(model, options.scale, work / "model")
            for workload in options.workloads:
                data = write_data(work / workload, options.images, QUESTIONS[workload])
                for command, found in run_commands(options, path, data, work):
                    named = {"model": model, "workload": workload, "command": command}
                    record(options, content, COLUMNS, {**named, **found})
    print(markdown(COLUMNS, content["results"]))


def write_data(folder: Path, images: int, questions: int) -> Path:
    """A JSONL file with some questions about each image, and the images, 640 x 480 JPEG."""
    folder.mkdir()
    draw = numpy.random.default_rng(0)
    rows = []
    for number in range(images):
        small = draw.integers(0, 256, (48, 64, 3), dtype=numpy.uint8)
        name = f"{number}.jpg"
        Image.fromarray(small).resize((640, 480)).save(folder / name)
        for question in range(questions):
            query = f"<image>What is at place {question} of picture {number}?"
            rows.append({"query": query, "response": "A red square. " * 5, "images": [name]})
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def run_commands(
    options: argparse.Namespace, model: Path, data: Path, work: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of training, then those of answering, each as soon as they are there."""
    shared = ["--model", str(model), "--dataset", str(data), "--device", options.device]
    shared += ["--quantize", options.quantize]
    output = work / f"{data.parent.name}-output"
    steps = ["--max-steps", str(options.steps), "--batch-size", "16", "--logging-steps", "1"]
    training = watch(["sft", *shared, *steps, "--output-dir", str(output)], work, options.device)
    yield "sft", training.figures()
    answering = [*shared, "--batch-size", "8", "--max-new-tokens", "32"]
    written = work / f"{data.parent.name}.jsonl"
    command = ["infer", *answering, "--output", str(written)]
    replies = watch(command, work, options.device, written)
    shutil.rmtree(output, ignore_errors=True)
    yield "infer", replies.figures()


@dataclass
class Watched:
    """What was seen of a command.

    Attributes:
        seconds: of the whole process.
        steps: when each step was told, in seconds since the start.
        replies: (when, lines) of the result file, as it grows.
        busy: (when, share) of nvidia-smi's samples.
    """

    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    images_per_second: float = float("nan")
    replies: list[tuple[float, int]] = field(default_factory=list)
    busy: list[tuple[float, float]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    code: int = 0

    def figures(self) -> dict[str, Any]:
        """The figures of a result; nan for what does not apply."""
        nan = float("nan")
        told = self.steps or [when for when, _ in self.replies] or [0.0]
        first, last = told[0], told[-1]
        answered = self.replies[-1][1] - self.replies[0][1] if self.replies else 0
        shares = [share for when, share in self.busy if first <= when <= last]
        gaps = [b - a for a, b in zip(self.steps, self.steps[1:], strict=False)]
        said = next((line for line in reversed(self.lines) if line.strip()), "")
        return {
            "start": first if self.steps else nan,
            "seconds": statistics.median(gaps) if gaps else nan,
            "busy": statistics.mean(shares) if shares else nan,
            "images_per_second": self.images_per_second,
            # The first batch is left out: before it the model is loaded.
            "replies_per_second": answered / (last - first) if answered else nan,
            "whole_seconds": self.seconds,
            "note": said.strip()[:120] if self.code else "",
        }


def watch(command: list[str], folder: Path, device: str, written: Path | None = None) -> Watched:
    """Runs a command of vlft and notes when it says what, and when a file gets new lines."""
    found = Watched()
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / f"cache-{command[0]}")}
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    started = time.perf_counter()
    smi = _start_smi(found, started) if device == "cuda" else None
    ended = Event()
    if written is not None:
        Thread(target=_follow, args=(written, found, started, ended), daemon=True).start()
    with subprocess.Popen(
        [sys.executable, "-m", "vlft", *command],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            found.lines.append(line)
            if STEP.match(line):
                found.steps.append(time.perf_counter() - started)
            if said := IMAGES.search(line):
                found.images_per_second = float(said[1].replace(",", ""))
    found.seconds, found.code = time.perf_counter() - started, process.returncode
    ended.set()
    if smi is not None:
        smi.terminate()
    return found


def _follow(path: Path, found: Watched, started: float, ended: Event) -> None:
    """Notes how many lines a file has, whenever it has more."""
    while not ended.wait(0.02):
        lines = path.read_bytes().count(b"\n") if path.is_file() else 0
        if lines > (found.replies[-1][1] if found.replies else 0):
            found.replies.append((time.perf_counter() - started, lines))


def _start_smi(found: Watched, started: float) -> subprocess.Popen[str]:
    """Samples the share of time in which the GPU computes, five times a second."""
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    smi = subprocess.Popen(["nvidia-smi", "-i", "0", *query], stdout=subprocess.PIPE, text=True)

    def read() -> None:
        assert smi.stdout is not None
        for line in smi.stdout:
            if line.strip().isdigit():
                found.busy.append((time.perf_counter() - started, int(line) / 100))

    Thread(target=read, daemon=True).start()
    return smi
