"""Records what a run was made from, to repeat it and to notice changes when it is resumed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import jsonlines
import torch

from vlft import __version__, console
from vlft.checkpoints.data_files import data_digests
from vlft.checkpoints.identity import is_other, small_files
from vlft.checkpoints.runs import ADAPTER_WEIGHTS, PROVENANCE, read_provenance
from vlft.data.image_notes import list_notes
from vlft.data.skipped import as_row
from vlft.errors import CheckpointError, shown
from vlft.files import digest, read_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlft.checkpoints.locate import ModelFolder
    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset
    from vlft.training.resume import Resumed

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "pillow")
# A file with 16 hex digits of the SHA-256 of every image, one line each, in the order of the data.
# One JSON object per line.
SKIPPED = "skipped_records.jsonl"
IMAGE_NOTES = "image_notes.jsonl"
IMAGE_DIGESTS = "image_digests.txt"


def write_provenance(
    run: Path, config: SftConfig, folder: ModelFolder, data: tuple[Dataset, Dataset]
) -> None:
    """Writes versions, machine, command, and digests of data, images and base into a run folder."""
    cuda = torch.cuda.is_available()
    record = {
        "vlft": __version__,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "data": data_digests([*config.dataset, *config.val_dataset]),
    }
    if config.adapter is not None:
        record["adapter"] = digest(config.adapter / ADAPTER_WEIGHTS)
    _write(run, record, folder, data)


def write_findings(run: Path, data: tuple[Dataset, Dataset]) -> None:
    """Writes which records were skipped, and which images have notes, and says where; if any."""
    skipped = {str(error): error for part in data for error in part.skipped}
    notes = list_notes(conversation for part in data for conversation in part.with_notes())
    for name, what, rows in (
        (SKIPPED, "records that were skipped", [as_row(error) for error in skipped.values()]),
        (IMAGE_NOTES, "notes on images", notes),
    ):
        if rows:
            with jsonlines.open(run / name, "w") as file:
                file.write_all(rows)
            console.info(f"{what}: {len(rows)}, see {shown(run / name)}")


def changes(
    run: Path, config: SftConfig, folder: ModelFolder, data: tuple[Dataset, Dataset]
) -> list[CheckpointError]:
    """What has changed of a run's base and images since it was started.

    A run of an older release is compared only as far as that release recorded it.
    """
    record = read_provenance(run)
    before = record.get("model_files", {"config.json": record.get("model_config")})
    now = small_files(folder.path)
    names = before.keys() | now.keys() if "model_files" in record else before.keys()
    found = [(folder.path / n, "the file is") for n in names if before.get(n) != now.get(n)]
    # With full tuning the checkpoint holds all weights, so the base's do not matter.
    if config.tuner == "lora" and is_other(record.get("base_weights", ""), folder.weights_digest):
        found.append((folder.path, "its weights are"))
    path, images = run / IMAGE_DIGESTS, _images(data)
    if path.is_file():
        old = read_text(path).split()
        if not all(re.fullmatch("[0-9a-f]{16}", line) for line in old):
            raise CheckpointError("damaged", place=shown(path), hint="copy it from a backup")
        if len(old) != len(images):
            found.append(
                (path, f"the data has {len(images)} usable images and had {len(old)}, it is")
            )
        elif old != list(images.values()):
            pairs = zip(old, images.items(), strict=True)
            found += [(path, "the image is") for one, (path, other) in pairs if one != other]
    hint = "put back what was there, or add --accept-changes to go on with what is there now"
    return [
        CheckpointError(f"{what} not what the run was started with", place=shown(path), hint=hint)
        for path, what in sorted(found)
    ]


def record_changes(
    run: Path,
    found: Sequence[CheckpointError],
    resumed: Resumed,
    folder: ModelFolder,
    data: tuple[Dataset, Dataset],
) -> None:
    """Adds accepted changes and extensions to a run's record.

    The next resume compares base and images with what is there now.
    """
    record = read_provenance(run)
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    change = {
        "resumed": when,
        "step": resumed.step,
        "command": sys.argv,
        "changed": [error.place for error in found],
        "settings": {name: list(values) for name, values in resumed.asked.items()},
    }
    _write(run, {**record, "changes": [*record.get("changes", []), change]}, folder, data)


def _write(
    run: Path, record: dict[str, Any], folder: ModelFolder, data: tuple[Dataset, Dataset]
) -> None:
    base = {"model_files": small_files(folder.path), "base_weights": folder.weights_digest}
    text = json.dumps({**record, **base}, indent=2)
    if images := _images(data):
        write_whole(run / IMAGE_DIGESTS, "".join(f"{d}\n" for d in images.values()))
    write_whole(run / PROVENANCE, text + "\n")


def _images(data: tuple[Dataset, Dataset]) -> dict[Path, str]:
    """16 hex digits of the SHA-256 of every image file, in the order of the data."""
    return {image.path: image.digest[:16] for part in data for image in part.images()}
