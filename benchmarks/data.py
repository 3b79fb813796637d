"""Checking of data before the first step: time and memory, from 10^3 to 10^6 records.

The records are dialogues of one or two short exchanges on an image, a hundred of them on each, ten
thousand images at most. Measured is what a run does before its first step without a model: files
are indexed, records and images checked, samples split and grouped, the rows of one step encoded.
"With receipt" is the second start on the same files. Memory is the peak above what the libraries
and the tokenizer hold.

    python -m benchmarks data --tokenizer PATH --output benchmarks/results/data-cpu
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from benchmarks.command import new_parser, note, prepare, publish
from benchmarks.measure import apart, measure
from vlft.checkpoints.locate import locate_model
from vlft.config import SftConfig
from vlft.training.samples import load_data, make_planner

if TYPE_CHECKING:
    from vlft.families.processor import Processor

TINY = Path(__file__).parent.parent / "sample_data" / "tiny-vl"
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sits",
    "on",
    "mat",
    "under",
    "red",
    "blue",
    "house",
    "while",
    "many",
    "people",
    "walk",
    "along",
    "a",
    "river",
    "and",
    "talk",
    "about",
    "weather",
    "in",
    "spring",
    "12",
    "photos",
    "of",
    "old",
    "towers",
    "near",
    "water",
    "were",
    "taken",
    "by",
    "one",
    "of",
    "them",
]
MOST_IMAGES = 10_000
COLUMNS = {
    "records": "{records:,}", "images": "{images:,}", "file, MB": "{megabytes:.0f}",
    "start": "{start}", "s": "{seconds:.1f}", "processor s": "{processor:.1f}",
    "us per record": "{each:.0f}", "peak, MB": "{peak_mb:.0f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("data", __doc__, repeats=0)
    parser.add_argument("--records", type=int, nargs="+", default=[10**n for n in range(3, 7)])
    parser.add_argument("--tokenizer", default=str(TINY), help="folder of tokenizer.json")
    parser.add_argument("--folder", help="of the data; default: a temporary one")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        model = make_model(Path(folder) / "model", Path(options.tokenizer))
        for records in options.records:
            data = make_data(Path(folder) / f"{records}.jsonl", records)
            for start in ("cold", "with receipt"):
                results.append({**apart(run, model, data, records), "start": start})
                note(f"{records:,} records, {start}: {results[-1]['seconds']:.1f} s")
            data.unlink()
    publish(options, content, COLUMNS, results)


def make_model(folder: Path, tokenizer: Path) -> Path:
    """A model folder without weights, with some tokenizer."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in tokenizer.glob("*.json"):
        if path.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if tokenizer != TINY:
        config["language_config"]["vocab_size"] = 2**17
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def make_data(path: Path, records: int, count: int | None = None) -> Path:
    """A file of dialogues, with its images beside it: ``count`` ones, or see ``image_count``."""
    draw = random.Random(records)
    images = path.parent / "images"
    images.mkdir(exist_ok=True)
    count = count or image_count(records)
    for number in range(count):
        image = images / f"{number}.jpg"
        if not image.exists():
            noise = Image.effect_noise((64, 64), 60)
            noise.putpixel((0, 0), number % 256)
            noise.resize((224, 224)).convert("RGB").save(image)
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            messages = []
            for exchange in range(draw.choice((1, 1, 2))):
                tag = "" if exchange else "<image>"
                messages += [
                    {"role": "user", "content": tag + " ".join(draw.choices(WORDS, k=12))},
                    {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=40))},
                ]
            row = {"messages": messages, "images": [f"images/{number % count}.jpg"]}
            file.write(json.dumps(row) + "\n")
    return path


def image_count(records: int) -> int:
    """The number of images of so many records."""
    return min(MOST_IMAGES, max(10, records // 100))


def run(model: Path, data: Path, records: int) -> dict[str, Any]:
    """Checks a data file, and plans and encodes its first step."""
    processor = locate_model(str(model), weights=False).processor()
    processor.encode({"query": "a", "response": "b"})
    used: list[float] = []

    def compute() -> float:
        started = processor_seconds()
        first_step(processor, data)
        used.append(processor_seconds() - started)
        return 0.0

    measured = measure(compute, torch.device("cpu"))
    return {
        "records": records, "images": image_count(records),
        "megabytes": data.stat().st_size / 1e6, "seconds": measured.seconds,
        "processor": used[0], "each": used[0] / records * 1e6,
        "peak_mb": measured.peak_bytes / 1e6,
    }  # fmt: skip


def first_step(processor: Processor, data: Path) -> None:
    """What a run does with its data before the first optimiser step."""
    config = SftConfig(dataset=(str(data),))
    train, _ = load_data(config, processor)
    planner = make_planner(config, processor, train, "cpu")
    for plan in planner.step(0):
        planner.packer.row([train[index] for index in plan.members])


def processor_seconds() -> float:
    """Of this process, its threads, and the processes that it has waited for."""
    used = os.times()
    return time.process_time() + used.children_user + used.children_system
