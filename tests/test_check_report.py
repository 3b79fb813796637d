"""What ``vlft check`` says of data that could be trained on, but perhaps should not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from conftest import GOLDEN, SIGLIP, VL2_NOAUX
from PIL import Image

from vlft.cli.check import run_check
from vlft.config import CheckConfig
from vlft.data.histograms import grouped, lines_of_histograms
from vlft.errors import DataError


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
        assert "equal" not in text
        assert "names" not in text


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
        # A sample that both sets hold counts as leakage; duplicates are counted within a set.
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

    def test_images_that_look_alike(self, report):
        """Resized and compressed again, with a palette: not equal, yet trained on."""
        names = ("photo_a.jpg", "photo_b.jpg", "chart.png", "giraffe.jpg")
        for name in names:
            shutil.copy(GOLDEN / "images" / name, name)
        write("t.jsonl", *((name, "Yes.", [name]) for name in names[:3]))
        with Image.open("photo_a.jpg") as photo, Image.open("chart.png") as chart:
            photo.convert("RGB").resize((90, 70)).save("small.jpg", quality=60)
            chart.convert("P", palette=Image.Palette.ADAPTIVE).save("few.png")
        paint("flat.png", colour="gray")
        new = ("small.jpg", "few.png", "giraffe.jpg", "flat.png", "photo_b.jpg")
        write("v.jsonl", *((name, "No.", [name]) for name in new))
        found, text = report("t.jsonl", val_dataset=("v.jsonl",))
        leakage = found["leakage"]
        assert (leakage["images"], leakage["images_alike"]) == (1, 2)
        pairs = [
            (Path(e["image"]).name, Path(e["looks_like"]).name) for e in leakage["alike_examples"]
        ]
        assert pairs == [("small.jpg", "photo_a.jpg"), ("few.png", "chart.png")]
        line = "validation: 2 images look like ones that are trained on, in another file (the first"
        assert f"{line}: small.jpg looks like photo_a.jpg)" in text


class TestReplies:
    def test_the_longest_against_the_median(self, report):
        rows = [("Q?", "x" * (20 + number), []) for number in range(9)]
        write("1.jsonl", *rows, ("Q?", "y" * 900, []), ("Q?", "y" * 800, []), ("Q?", "y" * 499, []))
        found, text = report("1.jsonl")
        assert found["replies"] == {
            "count": 12, "shortest": 20, "median": 26, "longest": 900, "extreme": 2,
            "extreme_examples": [
                {"sample": "1.jsonl:10", "characters": 900},
                {"sample": "1.jsonl:11", "characters": 800},
            ],
        }  # fmt: skip
        assert (
            "characters of the replies: shortest 20, median 26, longest 900\n"
            "2 replies are 20 times as long as the median or longer (the longest: 1.jsonl:10, 900 "
            "characters)\n"
        ) in text

    def test_context_is_no_reply(self, report):
        turns = [
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "x" * 5000, "loss": False},
            {"role": "user", "content": "B?"},
            {"role": "assistant", "content": "four"},
        ]
        Path("1.jsonl").write_text(json.dumps({"messages": turns}))
        found, text = report("1.jsonl")
        assert (found["replies"]["count"], found["replies"]["longest"]) == (1, 4)
        assert "times as long" not in text


class TestHistograms:
    def test_of_all_files_together(self, report):
        paint("a.png", size=(30, 10))
        paint("b.png", size=(10, 31))
        write("1.jsonl", ("Q?", "1", ["a.png"]), ("Q?", "2", ["a.png", "b.png"]))
        write("2.jsonl", ("Q?", "3", []), ("Q?", "4", ["a.png"]))
        found, text = report("1.jsonl", "2.jsonl", model=str(SIGLIP.folder))
        shown = found["histograms"]
        tokens = shown.pop("tokens")
        assert shown == {
            "turns": {"2": 4},
            "images_per_sample": {"0": 1, "1": 2, "2": 1},
            "longer_side_of_images": {"30": 1, "31": 1},
        }
        assert sum(tokens.values()) == 4
        assert f"  {'1':>13} {'#' * 40} 2 (50%)\n  {'2':>13} {'#' * 20}" in text
        assert "images per sample:\n" in text

    def test_many_values_are_counted_in_ranges_within_80_columns(self):
        counts = dict.fromkeys(range(70), 10**7)
        found = grouped(counts)
        assert found == {
            name: number * 10**7
            for name, number in {
                "0-1": 2, "2-2": 1, "3-4": 2, "5-8": 4, "9-16": 8, "17-32": 16, "33-64": 32,
                "65-128": 5,
            }.items()
        }  # fmt: skip
        wide = {"131073-262144": 10**7, "262145-524288": 999}
        for lines in map(list, (lines_of_histograms({"tokens": item}) for item in (found, wide))):
            assert max(map(len, lines)) <= 80
            assert all(line.count("#") >= 1 for line in lines[1:])


def test_samples_that_are_too_long_are_refused_as_by_sft(report, capsys):
    write("1.jsonl", ("Q?", "1", []), ("Q?", "long " * 100, []))
    settings = {"model": str(SIGLIP.folder), "max_length": 128}
    with pytest.raises(DataError, match=r"1.jsonl:2: \d+ tokens, at most 128 are allowed"):
        run_check(CheckConfig(dataset=("1.jsonl",), **settings))
    capsys.readouterr()
    with pytest.raises(typer.Exit):
        run_check(CheckConfig(dataset=("1.jsonl",), **settings, json=True))
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] is False
    assert [problem["record"] for problem in found["problems"]] == [2]
    assert report("1.jsonl", **settings, on_bad_sample="skip")[0]["usable"] is True
    run_check(CheckConfig(dataset=("1.jsonl",), max_length=128))
    assert "--max-length has no effect: --model is not given" in capsys.readouterr().err


def test_the_flag_that_skips_long_samples_is_said_to_be_of_sft():
    write("1.jsonl", ("One?", "A long reply. " * 20, []))
    config = CheckConfig(dataset=("1.jsonl",), model=str(SIGLIP.folder), max_length=50)
    with pytest.raises(DataError, match="raise --max-length, or give vlft sft --on-long skip or"):
        run_check(config)


def test_samples_of_weight_0_are_counted_and_cannot_be_all(report):
    rows = [{"query": "q", "response": "r", "weight": weight} for weight in (0, 1, 0)]
    Path("1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, text = report("1.jsonl")
    assert (found["files"][0]["of_weight_0"], found["usable"]) == (2, True)
    assert "1.jsonl: 3 records, 3 read; 3 samples, 2 of weight 0; 0 images" in text
    Path("1.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="1 sample has weight 0, and there is no other"):
        run_check(CheckConfig(dataset=("1.jsonl",)))
