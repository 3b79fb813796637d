"""Damaged records and images: a problem with its place or a sample, never a fault or a hang.

``--records N`` asks for more than the short form; ``make torture`` asks for 20,000 records and a
tenth as many images.
"""

from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

import damage
import hostile
import pytest
from conftest import VL2_NOAUX
from PIL import Image

from vlft.data.conversation import ImageFacts
from vlft.data.images import decoded, inspect_images
from vlft.data.options import DataOptions, Reading
from vlft.data.specs import open_file
from vlft.data.split import Draws
from vlft.errors import DataError

BATCH = 500
ASK, SAY = {"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": "There."}
# One for each way to write a sample.
RECORDS: list[Any] = [
    {"messages": [{"role": "system", "content": "Be brief."}, ASK, SAY], "images": ["a.png"]},
    {"messages": [{"role": "user", "content": [{"type": "image", "index": 0},
                                               {"type": "text", "text": "Where?"}]},
                  {**SAY, "loss": False}, {"role": "user", "content": "Sure?"}, SAY],
     "images": ["a.png"]},
    {"conversations": [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "x"}],
     "image": {"path": "a.png", "bytes": None}, "id": 7},
    [ASK | {"images": ["a.png"]}, SAY],
    {"qa": [{"question": "Where?", "answer": "x"}, {"question": "Sure?", "answer": "y"}],
     "image": "a.png"},
    {"prompt": [ASK], "completion": [SAY], "images": ["a.png"]},
    {"query": "And <image>?\n", "response": " 3", "history": [["<image>?", "7"]], "system": "",
     "images": ["a.png", "a.png"]},
    {"instruction": "Name it.", "input": "In words.", "output": "seven", "image": "a.png"},
    {"question": "<img>a.png</img>?", "answers": ["x", "y"]},
    {"query": "<image_0> and <image_1>", "response": "x",
     "images": {"<image_0>": "a.png", "<image_1>": "a.png"}},
    {"prompt": "?", "chosen": "good", "rejected": "bad", "image": "a.png"},
    {"query": "<image>Find <ref-object>.", "response": "<bbox><bbox>", "images": ["a.png"],
     "objects": {"ref": ["a bar"], "bbox": [[1, 2, 30, 40], [0.5, 0, 9, 9]], "image_id": [0, 0]}},
    {"messages": [ASK, {"role": "assistant", "content": "<ref-object><bbox>"}],
     "images": ["a.png"],
     "objects": [{"ref": "x", "bbox": [0, 0, 0.5, 1], "bbox_type": "norm1", "image_id": 0}]},
]  # fmt: skip
FLAGS = ["--answers", "first", "--preference", "chosen", "--on-bad-sample", "skip"]
READING = Reading(has_boxes=True, answers="first", preference="chosen")
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "GIF": ".gif", "TIFF": ".tif", "WEBP": ".webp",
           "BMP": ".bmp"}  # fmt: skip


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((48, 48), 50).convert("RGB").save("a.png")


@pytest.fixture(scope="module")
def records(request) -> int:
    return request.config.getoption("--records")


def damaged(chance: random.Random) -> Any:
    """A record with up to three values replaced, or added to an object."""
    record: Any = {"record": chance.choice(RECORDS)}
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        place = chance.choice(damage.places(record))
        value = functools.reduce(lambda owner, key: owner[key], place, record)
        if isinstance(value, dict) and chance.random() < 0.5:
            record = damage.replaced(record, (*place, "x"), chance.choice([1, "", {"y": []}]))
            continue
        record = damage.replaced(record, place, chance.choice(damage.VALUES))
        if not isinstance(record.get("record"), dict | list):
            break
    return record.get("record")


def damaged_text(texts: list[str], chance: random.Random) -> bytes:
    """The lines, of which some bytes are changed."""
    data = bytearray("\n".join(texts).encode("utf-8", "replace"))
    for _ in range(20):
        at = chance.randrange(len(data))
        data[at : at + chance.choice((0, 1, 3))] = chance.choice((b"", b'"', b"{", b"\xff", b",\n"))
    return bytes(data)


def test_records(records):
    """Values are replaced in half of the batches, bytes in the others."""
    for start in range(0, records, BATCH):
        chance = random.Random(start)
        rows = [damaged(chance) for _ in range(min(BATCH, records - start))]
        Path("d.json").write_text(json.dumps(rows), "utf-8")
        Path("d.jsonl").write_bytes(damaged_text(list(map(json.dumps, rows)), chance))
        for name in ("d.json", "d.jsonl"):
            words = ["check", name, *FLAGS, "--model", str(VL2_NOAUX.folder), "--overwrite"]
            words += ["--write", "out.jsonl"]
            outcome = hostile.run(words, Path("log"))
            assert not outcome.faults([name]), (start, name, outcome.errors[-2000:])
        check_round_trip("d.json")


def check_round_trip(name: str) -> None:
    """Problems have places, and what is read of a file is read of what check writes."""
    options: dict[str, Any] = {"reading": READING}
    read = open_file(name, Draws(0), DataOptions(**options), {})
    assert all(str(problem).startswith(f"{name}:") for problem in read.problems)
    assert len(read.items) > len(RECORDS)
    words = ["check", name, *FLAGS, "--model", str(VL2_NOAUX.folder), "--overwrite"]
    hostile.run([*words, "--write", "out.jsonl"], Path("log"))
    again = open_file("out.jsonl", Draws(0), DataOptions(**options), {})
    assert again.problems == ()
    assert [[turn.parts for turn in shown(item)] for _, item in again.items] == [
        [turn.parts for turn in shown(item)] for _, item in read.items
    ]


def shown(item: Any) -> Any:
    """The turns of a conversation without how its images were named."""
    return item.map_images(lambda ref: ref.facts.digest).turns


def test_images(records):
    chance = random.Random(0)
    kinds = []
    for kind, ending in FORMATS.items():
        buffer = io.BytesIO()
        Image.effect_noise((64, 40), 50).convert("RGB").save(buffer, kind)
        kinds.append((buffer.getvalue(), ending))
    for number in range(records // 10):
        whole, ending = chance.choice(kinds)
        data = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            # Headers are where sizes are.
            at = chance.randrange(min(len(data), chance.choice((64, 10**9))))
            data[at : at + chance.choice((0, 1, 4))] = chance.randbytes(chance.choice((0, 1, 4)))
        path = Path(f"{number}{ending}")
        path.write_bytes(data)
        facts = inspect_images([path])[path]
        if isinstance(facts, ImageFacts):
            with decoded(path, digest=facts.digest) as image:
                assert (image.mode, image.size) == ("RGB", facts.size)
        else:
            assert isinstance(facts, DataError)
            assert str(facts).startswith(str(path))
        path.unlink()
