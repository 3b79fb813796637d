"""The receipt of a data file: what it spares, and that it is used for the same file alone."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlft.data import images, known_facts, receipt, source
from vlft.data.dataset import Dataset, load_dataset
from vlft.data.options import DataOptions, Reading
from vlft.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(receipt, "FEWEST_BYTES", 1)
    for number in range(3):
        Image.new("RGB", (20 + number, 20), (number, 80, 9)).save(f"{number}.png")
    rows = [
        {"query": f"<image>q{n}", "response": "r" * (n + 1), "images": [f"{n % 3}.png"]}
        for n in range(9)
    ]
    Path("a.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def load(processor, monkeypatch):
    """(options) -> the data set, and how many records and images were checked for it."""
    checked: dict[str, int] = {}

    def counting(name: str, module: Any) -> None:
        original = getattr(module, name)

        def count(first, *args, **options):
            paths = list(first) if name == "inspect_images" else first
            checked[name] += len(paths) if name == "inspect_images" else 1
            return original(paths, *args, **options)

        monkeypatch.setattr(module, name, count)

    counting("read_record", source)
    counting("inspect_images", source)

    def run(**options: Any) -> tuple[Dataset, int, int]:
        checked.update(read_record=0, inspect_images=0)
        known = DataOptions(Reading(processor.chat.image_tag), **options)
        data = load_dataset(["a.jsonl"], processor.encoder, known)
        return data, checked["read_record"], checked["inspect_images"]

    return run


def shown(data: Dataset) -> list[Any]:
    return [
        (sample.input_ids.tolist(), sample.images, item.place, position)
        for sample, item, position in zip(data, data.conversations, data.positions, strict=True)
    ]


def kept() -> list[Path]:
    return sorted(Path("cache/vlft/receipts").glob("*.npz"))


def test_the_second_start_checks_nothing(load):
    first, *counts = load(max_length=4000)
    assert counts == [9, 3]
    again, *counts = load(max_length=4000)
    assert counts == [0, 0]
    assert shown(again) == shown(first)
    assert (again.flags, len(kept())) == (first.flags, 1)
    assert again.identities.tolist() == first.identities.tolist()


def test_lengths_that_had_to_be_counted_are_kept(load, processor, monkeypatch):
    limit = max(len(sample) for sample in load()[0])
    data, *_ = load(max_length=limit)
    assert (data.lengths >= 0).any()
    monkeypatch.setattr(type(processor.encoder), "lengths", None)
    assert load(max_length=limit)[0].lengths.tolist() == data.lengths.tolist()


def test_an_image_that_has_changed_is_checked_again(load):
    load()
    Image.new("RGB", (50, 90)).save("1.png")
    data, records, images = load()
    assert (records, images) == (0, 1)
    assert data.conversations[1].images[0].facts.size == (50, 90)
    Path("1.png").unlink()
    with pytest.raises(UsageError, match=r"a.jsonl:3: 1.png: no such image"):
        load()


@pytest.mark.parametrize("change", ["content", "limit", "exif"])
def test_another_file_or_reading_has_no_receipt(load, change):
    load()
    if change == "content":
        Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("q3", "q4"))
    options: dict[str, Any] = {"limit": {"max_length": 4000}, "exif": {"rotate": True}}.get(
        change, {}
    )
    assert load(**options)[1] == 9
    assert len(kept()) == 2


@pytest.mark.parametrize("damage", ["cut", "bytes", "empty", "lie", "meta"])
def test_a_damaged_receipt_is_none(load, damage):
    first, *_ = load()
    (path,) = kept()
    data = path.read_bytes()
    if damage in ("cut", "bytes", "empty"):
        middle = len(data) // 2
        # So many that some are of an array: the headers of a zip file are not all checked.
        changed = bytes(byte ^ 255 for byte in data[middle : middle + 200])
        changed = data[:middle] + changed + data[middle + 200 :]
        path.write_bytes({"cut": data[:middle], "bytes": changed, "empty": b""}[damage])
    else:
        found = receipt.read_receipt(path)
        arrays, meta = dict(found.arrays), dict(found.meta)
        if damage == "lie":
            arrays["images"] = arrays["images"] + 7
        else:
            meta["images"] = [["a.png"]]
        receipt.write_receipt(path, dataclasses.replace(found, meta=meta, arrays=arrays))
    data, records, images = load()
    assert (records, images) == (9, 3)
    assert shown(data) == shown(first)


def test_a_file_with_a_problem_has_none(load):
    with Path("a.jsonl").open("a") as file:
        file.write("{broken\n")
    assert len(load(on_bad_sample="skip")[0]) == 9
    assert kept() == []


def test_a_file_that_changes_while_a_run_reads_it_is_noticed(load, monkeypatch):
    data, *_ = load()
    again, *_ = load()
    assert len(again) == len(data)
    text = Path("a.jsonl").read_text()
    with Path("a.jsonl").open("r+") as file:
        file.write(text.replace("q5", "x5"))
    with pytest.raises(DataError, match=r"^a.jsonl:7: the data file has changed since"):
        again[5]
    assert np.asarray(again[4].input_ids).size


def test_old_receipts_are_removed(load, monkeypatch):
    monkeypatch.setattr(receipt, "MOST_RECEIPTS", 2)
    for limit in (2000, 2001, 2002, 2003):
        load(max_length=limit)
    assert len(kept()) == 2
    assert load(max_length=2003)[1] == 0


@pytest.fixture
def opened(monkeypatch):
    """Paths of the images that were decoded."""
    found: list[str] = []
    original = images.inspect_image
    monkeypatch.setattr(
        images, "inspect_image", lambda path, **o: found.append(path.name) or original(path, **o)
    )
    return found


def test_images_of_a_file_that_has_changed_are_not_decoded_again(load, opened):
    first, *_ = load()
    assert sorted(opened) == ["0.png", "1.png", "2.png"]
    opened.clear()
    Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("q3", "q4"))
    again, records, _ = load()
    assert (records, opened) == (9, [])
    facts = [[image.facts for image in item.images] for item in again.conversations]
    assert facts == [[image.facts for image in item.images] for item in first.conversations]
    # An image with other bytes, or that is to be turned.
    Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("q4", "q5"))
    Image.new("RGB", (50, 90)).save("1.png")
    changed, *_ = load()
    assert opened == ["1.png"]
    assert changed.conversations[1].images[0].facts.size == (50, 90)
    load(rotate=True)
    assert len(opened) == 4


@pytest.mark.parametrize("damage", ["bytes", "text", "table", "folder"])
def test_what_is_known_of_images_counts_as_nothing_if_it_is_damaged(load, opened, damage):
    load()
    (database,) = Path("cache/vlft/facts").glob("*.db")
    if damage == "bytes":
        data = bytearray(database.read_bytes())
        data[:30] = b"x" * 30
        database.write_bytes(data)
    elif damage == "text":
        database.write_text("hello " * 100)
    elif damage == "table":
        database.unlink()
        with closing(sqlite3.connect(database)) as made, made:
            made.execute("CREATE TABLE images (path TEXT)")
    else:
        database.unlink()
        database.mkdir()
    opened.clear()
    Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("q3", "q4"))
    load()
    assert len(opened) == 3


def test_another_release_decodes_images_anew(load, opened, monkeypatch):
    load()
    monkeypatch.setattr("PIL.__version__", "1.0")
    Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("q3", "q4"))
    load()
    assert len(opened) == 6


def test_more_images_than_are_remembered_are_forgotten(load, opened, monkeypatch):
    monkeypatch.setattr(known_facts, "MOST_ROWS", 2)
    for number in range(2):
        Path("a.jsonl").write_text(Path("a.jsonl").read_text().replace("q3", f"q3{number}"))
        Image.new("RGB", (9, 9 + number)).save("2.png")
        load()
    with closing(sqlite3.connect("cache/vlft/facts/images.db")) as database:
        assert database.execute("SELECT COUNT(*) FROM images").fetchone() == (1,)
