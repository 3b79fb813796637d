"""What ``vlft check`` says of data that could be trained on, but perhaps should not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import VL2_NOAUX
from PIL import Image

from vlft.cli.check import run_check
from vlft.config import CheckConfig


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: tuple[str, str, list[str]]) -> str:
    """A data file of question, reply and images."""
    records = [
        {
            "messages": [
                {"role": "user", "content": "<image>" * len(images) + query},
                {"role": "assistant", "content": reply},
            ],
            "images": images,
        }
        for query, reply, images in rows
    ]
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def paint(*names: str, colour: str = "red", size: tuple[int, int] = (20, 10)) -> None:
    for name in names:
        Image.new("RGB", size, colour).save(name)


@pytest.fixture
def report(capsys):
    """Runs the check: the report for programs, and the lines for people."""

    def run(*files: str, **settings: object) -> tuple[dict, str]:
        run_check(CheckConfig(dataset=files, **settings, json=True))
        found = json.loads(capsys.readouterr().out)
        run_check(CheckConfig(dataset=files, **settings))
        return found, capsys.readouterr().out

    return run


class TestDuplicates:
    def test_the_same_sample_within_a_file_and_across_files(self, report):
        """The image counts by content; another reply or another image is another sample."""
        paint("a.png", "copy.png")
        paint("b.png", colour="blue")
        row = ("What is it?", "Red.", ["a.png"])
        write("1.jsonl", row, ("What is it?", "Blue.", ["b.png"]), row)
        write("2.jsonl", ("What is it?", "Red.", ["copy.png"]), ("What is it?", "Red.", ["b.png"]))
        found, text = report("1.jsonl", "2.jsonl")
        assert found["duplicates"].keys() == {"dataset"}
        assert "leakage" not in found
        duplicates = found["duplicates"]["dataset"]
        assert duplicates["samples"] == 2
        assert duplicates["sample_examples"] == [
            {"sample": "1.jsonl:3", "equals": "1.jsonl:1"},
            {"sample": "2.jsonl:1", "equals": "1.jsonl:1"},
        ]
        assert (
            "2 samples equal an earlier one (the first: 1.jsonl:3 equals 1.jsonl:1)\n"
            "1 image has several names, 2 in all (the first: a.png, copy.png)\n"
        ) in text

    def test_an_image_under_many_names(self, report):
        names = [f"{number}.png" for number in range(7)]
        paint(*names)
        paint("other.png", colour="blue")
        write("1.jsonl", *((name, "Red.", [name, "other.png"]) for name in names))
        duplicates = report("1.jsonl")[0]["duplicates"]["dataset"]
        assert (duplicates["images"], duplicates["image_files"]) == (1, 7)
        assert [len(names) for names in duplicates["image_examples"]] == [5]
        assert duplicates["samples"] == 0

    def test_other_boxes_are_another_sample(self, report):
        paint("a.png", size=(40, 40))
        rows = [
            {
                "query": "<image>Find <ref-object>.",
                "response": "<bbox>",
                "images": ["a.png"],
                "objects": {"ref": ["disc"], "bbox": [[0, 0, right, 20]]},
            }
            for right in (10, 20, 10)
        ]
        Path("1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found, _ = report("1.jsonl", model=str(VL2_NOAUX.folder))
        (example,) = found["duplicates"]["dataset"]["sample_examples"]
        assert example == {"sample": "1.jsonl:3", "equals": "1.jsonl:1"}

    def test_nothing_is_said_of_data_without(self, report):
        write("1.jsonl", ("One?", "1", []), ("Two?", "1", []), ("One?", "2", []))
        found, text = report("1.jsonl")
        assert found["duplicates"]["dataset"]["samples"] == 0
        assert text.splitlines() == [
            "1.jsonl: 3 records, 3 read; 3 samples; 0 images, 0 distinct"
        ]  # fmt: skip


class TestLeakage:
    def test_equal_samples_and_images(self, report):
        paint("a.png", "copy.png")
        paint("b.png", colour="blue")
        write("t.jsonl", ("What is it?", "Red.", ["a.png"]), ("Hello.", "Hi.", []))
        write(
            "v.jsonl",
            ("Hello.", "Hi.", []),
            ("Which colour?", "Red.", ["copy.png", "b.png"]),
            ("What?", "Blue.", ["b.png"]),
            ("What is it?", "Red.", ["copy.png"]),
        )
        found, text = report("t.jsonl", val_dataset=("v.jsonl",))
        assert found["usable"] is True
        assert found["leakage"]["samples"] == 2
        assert found["leakage"]["sample_examples"] == [
            {"sample": "v.jsonl:1", "equals": "t.jsonl:2"},
            {"sample": "v.jsonl:4", "equals": "t.jsonl:1"},
        ]
        assert (found["leakage"]["images"], found["leakage"]["samples_with_images"]) == (1, 2)
        (example,) = found["leakage"]["image_examples"]
        assert [Path(example[key]).name for key in ("image", "equals")] == ["copy.png", "a.png"]
        # What both sets hold is leakage, and no duplicate.
        assert found["duplicates"]["dataset"]["samples"] == 0
        assert found["duplicates"]["val_dataset"]["images"] == 0
        assert (
            "validation: 2 are training samples too (the first: v.jsonl:1 equals t.jsonl:2)\n"
            "validation: 1 image is trained on too, in 2 samples (the first: copy.png equals a.png)"
        ) in text

    def test_nothing_is_said_of_sets_apart(self, report):
        paint("a.png")
        paint("b.png", colour="blue")
        write("t.jsonl", ("What is it?", "Red.", ["a.png"]))
        write("v.jsonl", ("What is it?", "Red.", ["b.png"]))
        found, text = report("t.jsonl", val_dataset=("v.jsonl",))
        assert (found["leakage"]["samples"], found["leakage"]["images"]) == (0, 0)
        assert "validation" not in text
