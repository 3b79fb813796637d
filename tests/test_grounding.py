"""Boxes: objects of a record -> the tags of DeepSeek-VL2 and DeepSeek-OCR, or an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MATRIX, OCR, OCR2, VL2_MHA, VL2_MLA, VL2_NOAUX, write_jsonl
from PIL import Image

from vlft.checkpoints.locate import describe
from vlft.cli.check import run_check
from vlft.cli.options import read_settings
from vlft.config import CheckConfig
from vlft.data import images
from vlft.data.boxes import numbers
from vlft.data.conversation import Box, ImageFacts, ImageRef, flat_text
from vlft.data.dataset import load_dataset
from vlft.data.encode import IGNORE
from vlft.data.ocr_blocks import read_blocks
from vlft.data.options import DataOptions, Reading
from vlft.data.source import problems_of
from vlft.data.specs import open_file
from vlft.data.split import Draws
from vlft.errors import UsageError

WIDTH, HEIGHT = 96, 64
BOXES = Reading(has_boxes=True)
DISC, BAR = [12, 8, 48, 56], [60, 16, 90, 48]
DISC_TEXT = "<|ref|>disc<|/ref|><|det|>[[125, 125, 500, 874]]<|/det|>"
BAR_TEXT = "<|ref|>bar<|/ref|><|det|>[[624, 250, 937, 749]]<|/det|>"
BOTH = {"ref": ["disc", "bar"], "bbox": [DISC, BAR]}


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT), "white").save("a.png")
    Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "red").save("b.png")


def row(query: str, response: str, objects: Any, images: list[str] | None = None) -> dict[str, Any]:
    return {
        "query": query,
        "response": response,
        "images": ["a.png"] if images is None else images,
        "objects": objects,
    }


def read(rows: list[dict[str, Any]], reading: Reading = BOXES, **options: Any) -> Any:
    write_jsonl(Path("d.jsonl"), rows)
    return open_file("d.jsonl", Draws(0), DataOptions(reading, **options), {})


def texts(file: Any) -> list[list[str]]:
    assert file.problems == ()
    return [[flat_text(turn, "<image>") for turn in item.turns] for _, item in file.items]


def message(fields: dict[str, Any], reading: Reading = BOXES) -> str:
    return str(problems_of(read([fields], reading), strict=True)[0])


class TestNumbers:
    @pytest.mark.parametrize(
        ("corners", "kind", "expected"),
        [
            ((0, 0, WIDTH, HEIGHT), "real", (0, 0, 999, 999)),
            (DISC, "real", (125, 125, 500, 874)),
            ((0.125, 0.125, 0.5, 0.875), "norm1", (125, 125, 500, 874)),
            ((125, 125, 500, 875), "norm1000", (125, 125, 500, 874)),
            ((0, 0, 1000, 1000), "norm1000", (0, 0, 999, 999)),
            # What rounding does outside of the image is cut off.
            ((-0.4, 0, 96.4, 64), "real", (0, 0, 999, 999)),
            ((10, 10, 10, 10), "norm1000", (10, 10, 10, 10)),
        ],
    )
    def test_of_kinds(self, corners, kind, expected):
        ref = ImageRef(Path("a.png"), "a.png", ImageFacts("", (WIDTH, HEIGHT)))
        assert numbers(Box(tuple(corners), kind, ref, "box 1")) == expected

    @pytest.mark.parametrize("side", [7, 384, 1000, 4032])
    def test_the_authors_code_draws_them_where_they_were(self, side):
        """It draws n at int(n / 999 * pixels)."""
        ref = ImageRef(Path("a.png"), "a.png", ImageFacts("", (side, side)))
        for x in range(0, side, max(1, side // 50)):
            (n, *_) = numbers(Box((x, 0, side, side), "real", ref, "box 1"))
            assert abs(int(n / 999 * side) - x) <= 1 + side / 999 / 2


class TestForms:
    @pytest.mark.parametrize(
        ("query", "response", "objects", "expected"),
        [
            ("<image>Find <ref-object>.", "<bbox>", {"ref": ["disc"], "bbox": [DISC]},
             ["<image>Find <|ref|>disc<|/ref|>.", DISC_TEXT]),
            # The models' replies repeat the ref, and boxes of one ref share a pair of tags.
            ("Find <ref-object>.", "<bbox><bbox>", {"ref": ["disc"], "bbox": [DISC, BAR]},
             ["<image>Find <|ref|>disc<|/ref|>.",
              "<|ref|>disc<|/ref|><|det|>[[125, 125, 500, 874], [624, 250, 937, 749]]<|/det|>"]),
            ("Where?", "<ref-object><bbox> by <ref-object><bbox>.", BOTH,
             ["<image>Where?", f"{DISC_TEXT} by {BAR_TEXT}."]),
            ("<ref-object> or <ref-object>?", "<bbox> or <bbox>", BOTH,
             ["<image><|ref|>disc<|/ref|> or <|ref|>bar<|/ref|>?", f"{DISC_TEXT} or {BAR_TEXT}"]),
            ("<|grounding|>Where is <|ref|>disc<|/ref|>?", "<bbox>", {"bbox": [DISC]},
             ["<image><|grounding|>Where is <|ref|>disc<|/ref|>?", DISC_TEXT]),
            ("What is at <bbox>?", "<ref-object>", [{"caption": "disc", "bbox": DISC}],
             ["<image>What is at <|det|>[[125, 125, 500, 874]]<|/det|>?", "<|ref|>disc<|/ref|>"]),
            ("Where?", "<ref-object><bbox>", [{"ref": "disc", "bbox": [DISC, BAR]}],
             ["<image>Where?",
              "<|ref|>disc<|/ref|><|det|>[[125, 125, 500, 874], [624, 250, 937, 749]]<|/det|>"]),
            ("Where?", "<ref-object><bbox>",
             json.dumps([{"caption": "disc", "bbox": [125, 125, 500, 875],
                          "bbox_type": "norm_1000", "image": 0}]),
             ["<image>Where?", DISC_TEXT]),
            ("Which?", "It is big.", {"ref": [], "bbox": []}, ["<image>Which?", "It is big."]),
            ("Layout.", "<ref-object><bbox>\n# One\n\n<ref-object><bbox>\nTwo.", BOTH,
             ["<image>Layout.", f"{DISC_TEXT}\n# One\n\n{BAR_TEXT}\nTwo."]),
        ],
    )  # fmt: skip
    def test_of_objects(self, query, response, objects, expected):
        assert texts(read([row(query, response, objects)])) == [expected]

    def test_an_image_of_its_own(self):
        objects = {"bbox": [DISC, DISC], "ref": ["x", "x"], "image_id": [0, 1]}
        fields = row("First, second.", "<ref-object><bbox><ref-object><bbox>", objects)
        found = texts(read([fields | {"images": ["a.png", "b.png"]}]))
        assert "[[125, 125, 500, 874]]" in found[0][1]
        assert "[[62, 62, 250, 437]]" in found[0][1]

    def test_what_no_tag_places_is_the_reply_or_dropped(self):
        objects = [{"ref": "disc", "bbox": DISC}, {"ref": "disc", "bbox": BAR},
                   {"ref": "bar", "bbox": BAR}]  # fmt: skip
        fields = row("Locate.", "", objects)
        disc = "<|ref|>disc<|/ref|><|det|>[[125, 125, 500, 874], [624, 250, 937, 749]]<|/det|>"
        asked = message(fields)
        assert 'd.jsonl:1: found "objects", and no <ref-object> or <bbox>' in asked
        assert "--objects reply" in asked
        reply = replace(BOXES, objects="reply")
        assert texts(read([fields], reply)) == [["<image>Locate.", f"{disc}\n{BAR_TEXT}"]]
        dropped = read([fields | {"response": "No."}], Reading(objects="drop"))
        assert texts(dropped) == [["<image>Locate.", "No."]]
        assert "is a reply already" in message(fields | {"response": "No."}, reply)

    def test_a_question_without_its_reply_leaves_the_boxes_of_the_reply(self):
        fields = row("Find <ref-object>.", "", {"ref": ["disc"], "bbox": [DISC]})
        found = texts(read([fields], replace(BOXES, need_response=False)))
        assert found == [["<image>Find <|ref|>disc<|/ref|>."]]

    def test_questions_as_samples_take_their_boxes_along(self):
        turns = [("Find <ref-object>.", "<bbox>"), ("And <ref-object>?", "<bbox>")]
        fields = {"qa": [{"question": q, "answer": a} for q, a in turns], "objects": BOTH}
        found = texts(read([fields | {"images": ["a.png"]}], replace(BOXES, qa="samples")))
        assert [replies[1] for replies in found] == [DISC_TEXT, BAR_TEXT]
        found = read([fields | {"images": ["a.png", "b.png"]}], replace(BOXES, qa="samples"))
        assert "box 2 is on an image of another question" in str(found.problems[0])


def test_what_is_trained_is_what_answers_are_read_as():
    objects = [{"ref": "title", "bbox": DISC}, {"ref": "text", "bbox": [BAR, DISC]}]
    text = "<ref-object><bbox>\n# One\n\n<ref-object><bbox>\nTwo."
    ((_, reply),) = texts(read([row("Layout.", text, objects)]))
    blocks = read_blocks(reply, (WIDTH, HEIGHT))
    assert [(block.type, block.text) for block in blocks] == [("title", "# One"), ("text", "Two.")]
    found = [box for block in blocks for box in block.boxes]
    for box, corners in zip(found, [DISC, BAR, DISC], strict=True):
        assert all(abs(one - other) <= 1 for one, other in zip(box, corners, strict=True))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"bbox": [[10, 20, 5, 30]]}, '"objects": box 1 [10, 20, 5, 30] is inverted'),
        ({"bbox": [[10, 20, 97.5, 30]]},
         "box 1 [10, 20, 97.5, 30] reaches outside of a.png, of 96 x 64 pixels"),
        ({"bbox": [[10, 20, 500, 30]]}, '"bbox_type": "norm1000"'),
        ({"bbox": [[-2, 20, 50, 30]]}, "reaches outside"),
        ({"bbox": [[0, 0, 1.1, 1]], "bbox_type": "norm1"}, "of 0 to 1"),
        ({"bbox": [[0.1, 0.2, 0.5, 0.6]]}, "bbox_type is not stated"),
        ({"bbox": [[10, 20]]}, "has 2 numbers, a point"),
        ({"bbox": [[10, 20, 30, "40"]]}, "a list of four numbers is allowed"),
        ({"bbox": [[10, 20, 30, True]]}, "a list of four numbers is allowed"),
        ({"bbox": [[10, 20, 30, float("nan")]]}, "a list of four numbers is allowed"),
        ({"bbox": [[1e999, 20, 30, 40]]}, "a list of four numbers is allowed"),
        ({"bbox": "x"}, '"objects": bbox: found text'),
        ({"bbox": [DISC], "bbox_type": "xywh"}, "bbox_type is 'xywh'"),
        ({"bbox": [DISC], "image_id": [1]}, "box 1 is on image 1, the record has 1 image"),
        ({"bbox": [DISC], "image_id": [-1]}, "image_id: found a number, -1"),
        ({"bbox": [DISC], "category": [3]}, "has 'category'"),
        ({"bbox": [DISC, BAR]}, '2 bbox in "objects", 1 <bbox> in the texts'),
        ({"bbox": []}, 'found <ref-object> in'),
        ({"bbox": [DISC], "ref": ["a", "b"]}, '2 ref in "objects", 1 <ref-object>'),
        ({"bbox": [DISC], "ref": ["a <|det|>"]}, "ref 1 holds <|det|>"),
        ({"bbox": [DISC], "ref": [" "]}, "ref 1 is empty"),
        ({"bbox": [DISC], "ref": [7]}, "ref 1: found a number"),
        ([1], '"objects": found a list'),
        ("{", '"objects": found text'),
    ],
)  # fmt: skip
def test_bad_objects_are_refused_with_their_place(fields, found):
    if isinstance(fields, dict):
        fields = {"ref": ["disc"], **fields} if fields["bbox"] else fields
    said = message(row("Find <ref-object>.", "<bbox>", fields))
    assert said.startswith("d.jsonl:1: ")
    assert found in said


def test_groups_of_boxes_that_no_ref_fits_are_refused():
    fields = row("<ref-object>, <ref-object>?", "<bbox> <bbox> <bbox>",
                 {"ref": ["a", "b"], "bbox": [DISC, BAR, DISC]})  # fmt: skip
    assert "3 groups of <bbox> and no <ref-object>, its question 2" in message(fields)


def test_boxes_are_of_the_image_as_the_model_gets_it():
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save("turned.jpg", exif=exif)
    fields = row("Where?", "<bbox>", {"bbox": [[0, 0, HEIGHT, WIDTH]]}, ["turned.jpg"])
    assert texts(read([fields], rotate=True))[0][1] == "<|det|>[[0, 0, 999, 999]]<|/det|>"
    assert "reaches outside" in message(fields)


@pytest.mark.parametrize("case", MATRIX, indirect=True, ids=str)
def test_a_family_with_tags_has_them_in_its_tokenizer(case, processor):
    ids = [processor.chat.tokenizer.token_to_id(tag) for tag in ("<|ref|>", "<|det|>")]
    expected = case in (VL2_MHA, VL2_MLA, VL2_NOAUX, OCR, OCR2)
    assert processor.family.has_boxes == expected
    if expected:
        assert None not in ids
    else:
        fields = row("Find <ref-object>.", "<bbox>", {"ref": ["disc"], "bbox": [DISC]})
        said = message(fields, Reading(has_boxes=processor.family.has_boxes))
        assert 'd.jsonl:1: found "objects"; this family has no tags for boxes' in said


@pytest.mark.parametrize("case", [VL2_NOAUX, OCR, OCR2], indirect=True, ids=str)
class TestTokens:
    QUESTION = "<image>\n<|grounding|>Locate <ref-object>."

    def test_of_the_reply_are_the_tags_and_digits(self, processor, monkeypatch):
        opened: list[Path] = []
        read_file = images._read
        monkeypatch.setattr(
            images, "_read", lambda path, *rest: (opened.append(path), read_file(path, *rest))[1]
        )
        fields = row(self.QUESTION, "<bbox>", {"ref": ["disc"], "bbox": [DISC]})
        typed = row(self.QUESTION.replace("<ref-object>", "<|ref|>disc<|/ref|>"), DISC_TEXT, None)
        write_jsonl(Path("d.jsonl"), [fields, typed])
        reading = Reading(processor.family.image_tag, has_boxes=True)
        options = DataOptions(reading)
        data = load_dataset(["d.jsonl"], processor.encoder, options)
        sample, same = data[0], data[1]
        assert sample.input_ids.tolist() == same.input_ids.tolist()
        assert sample.labels.tolist() == same.labels.tolist()
        # The size of the image is known from the check of the data.
        assert opened == [Path("a.png")]
        chat = processor.chat
        name = chat.tokenizer.token_to_id
        labels = [label for label in sample.labels.tolist() if label != IGNORE]
        inner = chat.tokenizer.encode("disc", add_special_tokens=False).ids
        boxes = chat.tokenizer.encode("[[125, 125, 500, 874]]", add_special_tokens=False).ids
        assert labels == [
            name("<|ref|>"), *inner, name("<|/ref|>"),
            name("<|det|>"), *boxes, name("<|/det|>"), chat.eos_id,
        ]  # fmt: skip
        assert name("<|grounding|>") in sample.input_ids.tolist()

    def test_records_that_differ_in_boxes_alone_are_not_the_same(self, processor):
        boxes = [DISC, [0, 0, 3, 1], DISC]
        rows = [row(self.QUESTION, "<bbox>", {"ref": ["disc"], "bbox": [box]}) for box in boxes]
        write_jsonl(Path("d.jsonl"), rows)
        options = DataOptions(Reading(processor.family.image_tag, has_boxes=True))
        first, other, again = load_dataset(["d.jsonl"], processor.encoder, options).identities
        assert first == again != other

    def test_of_a_record_from_python_are_the_same(self, processor, tmp_path):
        fields = row(self.QUESTION, "<bbox>", {"ref": ["disc"], "bbox": [DISC]})
        typed = row(self.QUESTION.replace("<ref-object>", "<|ref|>disc<|/ref|>"), DISC_TEXT, None)
        samples = [processor.encode(item, tmp_path) for item in (fields, typed)]
        assert samples[0].input_ids.tolist() == samples[1].input_ids.tolist()
        with pytest.raises(UsageError, match="reaches outside"):
            processor.encode(row("q", "<bbox>", {"bbox": [[0, 0, 200, 9]]}), tmp_path)


def test_check_needs_the_model_and_writes_what_it_reads(capsys):
    objects = {"ref": ["disc"], "bbox": [DISC]}
    write_jsonl(Path("d.jsonl"), [row("Find <ref-object>.", "<bbox>", objects)])
    model = ["--model", str(VL2_NOAUX.folder)]

    def check(*words: str) -> None:
        run_check(read_settings(CheckConfig, "check", list(words))[0])

    with pytest.raises(UsageError, match="vlft check --model MODEL"):
        check("d.jsonl")
    check("d.jsonl", *model, "--write", "one.jsonl")
    check("one.jsonl", *model, "--write", "two.jsonl")
    one, two = (json.loads(Path(name).read_text("utf-8")) for name in ("one.jsonl", "two.jsonl"))
    assert one["messages"] == two["messages"]
    assert one["messages"][1]["content"] == DISC_TEXT
    capsys.readouterr()
    assert describe(VL2_NOAUX.folder).family.has_boxes
