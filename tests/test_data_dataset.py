"""Data files -> datasets: samples drawn, split, skipped, cut or refused, and the messages."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import GOLDEN, in_dialogues
from PIL import Image
from rich.console import Console

import vlft
from vlft import console
from vlft.data.conversation import Conversation, ImageFacts, ImageRef, Turn
from vlft.data.dataset import Dataset, load_dataset, load_train_and_val
from vlft.data.encode import EncodedImage, EncodedSample
from vlft.data.fit import fit
from vlft.data.options import DataOptions, Reading
from vlft.data.split import read_history, write_split
from vlft.errors import CollectedError, DataError, UsageError
from vlft.training.samples import distinct_images, make_schedule
from vlft.vision.cache import fill
from vlft.vision.cache_plan import CachePlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlft.data.encoder import Extent

IMAGE_TOKENS = 10
READING = Reading("<image_placeholder>")
OPTIONS = DataOptions(reading=READING)


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def image(golden_image) -> str:
    Path("a.png").write_bytes(golden_image)
    return "a.png"


@pytest.fixture(scope="session")
def golden_image() -> bytes:
    return (GOLDEN / "images" / "speck.png").read_bytes()


class Letters:
    """In place of a tokenizer: a character is one token, an image is ten."""

    image_token_id = -1
    fingerprint = "letters"

    def encode(self, conversation: Conversation) -> EncodedSample:
        ids: list[int] = []
        for part in (part for turn in conversation.turns for part in turn.parts):
            ids += [-1] * IMAGE_TOKENS if isinstance(part, ImageRef) else map(ord, part)
        images = tuple(self.image(ref.path, ref.facts, 1) for ref in conversation.images)
        return EncodedSample(torch.tensor(ids), torch.tensor(ids), "", images)

    def image(
        self, path: Path, facts: ImageFacts, count: int, *, drawn: bool = False
    ) -> EncodedImage:
        return EncodedImage(path, facts.digest, IMAGE_TOKENS)

    def check(self, conversation: Conversation) -> None:
        """Takes all."""

    def as_text(self, conversation: Conversation) -> tuple[str, ...]:
        return ()

    def most_tokens(self, extent: Extent, images: Sequence[EncodedImage]) -> int | None:
        return extent.size + IMAGE_TOKENS * len(images)

    def lengths(self, conversations: Sequence[Conversation]) -> list[int]:
        return [len(self.encode(conversation)) for conversation in conversations]


encode = Letters()


def write(name: str, rows: Sequence[dict[str, Any] | str]) -> str:
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(text + "\n" for text in texts), "utf-8")
    return name


def numbered(name: str, count: int) -> str:
    return write(name, [{"query": f"{name} {i}", "response": "r"} for i in range(count)])


def queries(data: Dataset) -> list[str]:
    return [flat(item)[-2] for item in data.conversations]


def flat(conversation: Conversation) -> list[str]:
    return [
        "".join(part if isinstance(part, str) else f"{{{part.given}}}" for part in turn.parts)
        for turn in conversation.turns
    ]


def load(*files: str, **options: Any) -> Dataset:
    reads = {f.name for f in dataclasses.fields(Reading)} & options.keys()
    reading = dataclasses.replace(READING, **{name: options.pop(name) for name in reads})
    return load_dataset(files, encode, dataclasses.replace(OPTIONS, reading=reading, **options))


def message(run: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as error:
        run()
    return str(error.value)


class TestReading:
    def test_files_in_the_order_given(self):
        numbered("b.jsonl", 3)
        numbered("a.jsonl", 2)
        assert queries(load("b.jsonl", "a.jsonl")) == [
            "b.jsonl 0", "b.jsonl 1", "b.jsonl 2", "a.jsonl 0", "a.jsonl 1",
        ]  # fmt: skip

    def test_all_three_formats_give_the_same(self, image):
        row = {"query": "q, <image>", "response": "r", "images": [image], "history": [["a", "b"]]}
        write("a.jsonl", [row])
        Path("a.json").write_text(json.dumps([row], indent=1))
        Path("a.csv").write_text(
            'query,response,images,history\n"q, <image>",r,a.png,"[[""a"", ""b""]]"\n'
        )
        made = [load(name).conversations[0] for name in ("a.jsonl", "a.json", "a.csv")]
        assert [flat(item) for item in made] == [["a", "b", "q, {a.png}", "r"]] * 3
        assert [item.place for item in made] == ["a.jsonl:1", "a.json:2", "a.csv:2"]

    def test_samples_are_encoded_when_they_are_asked_for(self):
        data = load(numbered("a.jsonl", 12))
        assert len(data) == 12
        assert len(data[11]) == len("a.jsonl 11" + "r")
        assert queries(data[2:4]) == ["a.jsonl 2", "a.jsonl 3"]

    def test_images_start_at_the_data_file_or_at_the_root(self, image, golden_image):
        for name in ("sub", "root"):
            Path(name).mkdir()
            Path(name, "b.png").write_bytes(golden_image)
        write("sub/a.jsonl", [{"query": "q", "response": "r", "images": ["b.png"]}])
        assert [str(i.path) for i in load("sub/a.jsonl").conversations[0].images] == ["sub/b.png"]
        data = load("sub/a.jsonl", image_root=Path("root"))
        assert [str(image.path) for image in data.conversations[0].images] == ["root/b.png"]

    def test_a_reply_is_optional_only_for_inference(self):
        write("a.jsonl", [{"query": "q"}])
        assert load("a.jsonl", need_response=False).conversations[0].reply is None
        assert message(lambda: load("a.jsonl")).startswith("a.jsonl:1: no reply among")

    @pytest.mark.parametrize("blank", ["", " \n"])
    def test_a_blank_reply_is_none_for_inference(self, blank):
        write("a.jsonl", [{"query": "q", "response": blank}])
        assert '"response" is empty' in message(lambda: load("a.jsonl"))
        assert load("a.jsonl", need_response=False).conversations[0].reply is None

    def test_the_tag_of_the_family_is_read(self, image):
        row = {"query": "x<image_placeholder>", "response": "r", "images": [image]}
        write("a.jsonl", [row])
        assert queries(load("a.jsonl")) == ["x{a.png}"]


class TestDrawing:
    def test_as_many_as_asked_in_their_order_and_by_the_seed(self):
        numbered("a.jsonl", 50)
        drawn = {seed: queries(load("a.jsonl#20", seed=seed)) for seed in range(5)}
        for seed, names in drawn.items():
            numbers = [int(name.split()[1]) for name in names]
            assert len(set(numbers)) == 20
            assert numbers == sorted(numbers)
            assert queries(load("a.jsonl#20", seed=seed)) == names
        assert len({tuple(names) for names in drawn.values()}) == 5
        assert len({name for names in drawn.values() for name in names}) > 40

    def test_all_and_leading_zeros(self):
        numbered("a.jsonl", 3)
        assert queries(load("a.jsonl#3")) == queries(load("a.jsonl"))
        assert queries(load("a.jsonl#03")) == queries(load("a.jsonl"))

    def test_a_file_that_is_named_twice(self, capsys):
        numbered("a.jsonl", 9)
        found = queries(load("a.jsonl#2", "a.jsonl#3", "a.jsonl#4"))
        assert sorted(found) == [f"a.jsonl {i}" for i in range(9)]
        # All of it is all of it, and said.
        assert len(load("a.jsonl#2", "a.jsonl")) == 11
        assert "2 of its records are taken already, and once more" in capsys.readouterr().err
        assert len(load("a.jsonl#6", "./a.jsonl#5")) == 9
        assert "./a.jsonl#5: takes all of its 3 records (6 are taken already)" in (
            capsys.readouterr().err
        )
        with pytest.raises(DataError, match=r"9 are taken(.|\n)*name another file"):
            load("a.jsonl", "a.jsonl#1")

    def test_validation_draws_what_training_has_left(self):
        numbered("a.jsonl", 40)
        for first, second in ((20, 20), (30, 10), (7, 3)):
            train, val = load_train_and_val(
                [f"a.jsonl#{first}"], [f"a.jsonl#{second}"], 0, encode, OPTIONS
            )
            assert len(set(queries(train) + queries(val))) == first + second

    def test_a_name_may_hold_the_mark(self):
        numbered("a#1.jsonl", 4)
        numbered("b.jsonl#2", 1)
        assert len(load("a#1.jsonl")) == 4
        assert len(load("a#1.jsonl#2")) == 2
        # What exists under the whole name is that file.
        assert "found '.jsonl#2' at the end of the name" in message(lambda: load("b.jsonl#2"))

    def test_of_json_and_csv_too(self):
        Path("a.json").write_text(json.dumps([{"query": "q", "response": "r"}] * 5))
        Path("a.CSV").write_text("query,response\n" + 5 * "q,r\n")
        assert len(load("a.json#2", "a.CSV#3")) == 5

    def test_more_than_there_are(self, capsys):
        numbered("a.jsonl", 3)
        assert len(load("a.jsonl#4")) == 3
        assert "warning: a.jsonl#4: takes all of its 3 records" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("share", "count"), [("20%", 2), ("100%", 10), ("0.1%", 1), ("25%", 2)]
    )
    def test_a_share(self, share, count):
        numbered("a.jsonl", 10)
        assert len(load(f"a.jsonl#{share}")) == count

    def test_patterns_are_files_in_the_order_of_their_names(self):
        for name in ("b.jsonl", "a.jsonl", "c.json"):
            numbered(name, 2)
        assert queries(load("*.jsonl")) == ["a.jsonl 0", "a.jsonl 1", "b.jsonl 0", "b.jsonl 1"]
        assert len(load("*.json*#1")) == 3
        assert message(lambda: load("x*.jsonl")) == (
            "x*.jsonl: matches no file\n hint: check the pattern"
        )

    @pytest.mark.parametrize("count", ["0", "00", "-3", "x", "", "1.5", "²", "1e3", 99 * "9"])
    def test_no_number(self, count):
        numbered("a.jsonl", 3)
        found = message(lambda: load(f"a.jsonl#{count}"))
        assert f": found #{count} after the name\n" in found
        assert found.endswith(
            " hint: write FILE#N for N of its records, FILE#20% for a share, or FILE for all"
        )

    def test_a_missing_file_is_named_without_the_number(self):
        assert message(lambda: load("no.jsonl#3")) == (
            "no.jsonl: no such file\n hint: check the path"
        )


class TestSplit:
    @pytest.mark.parametrize(
        ("count", "ratio", "expected"),
        [(20, 0.25, 5), (20, 0.01, 1), (2, 0.9, 1), (3, 0.9, 2), (10, 0.05, 1), (20, 0, 0)],
    )
    def test_sizes(self, count, ratio, expected):
        train, val = self.both([numbered("a.jsonl", count)], [], ratio)
        assert (len(train), len(val)) == (count - expected, expected)

    def test_disjoint_whole_in_order_and_by_the_seed(self):
        file = numbered("a.jsonl", 40)
        splits = [
            [queries(part) for part in self.both([file], [], 0.3, seed=seed)] for seed in range(5)
        ]
        for train, val in splits:
            assert sorted(train + val) == sorted(queries(load(file)))
            for part in (train, val):
                assert part == sorted(part, key=lambda name: int(name.split()[1]))
        assert len({tuple(val) for _, val in splits}) == 5
        assert [queries(part) for part in self.both([file], [], 0.3, seed=4)] == splits[4]

    def both(self, files, val_files, ratio, **options):
        return load_train_and_val(
            files, val_files, ratio, encode, dataclasses.replace(OPTIONS, **options)
        )

    def test_a_validation_file_is_not_split(self):
        numbered("a.jsonl", 10)
        numbered("v.jsonl", 2)
        train, val = self.both(["a.jsonl"], ["v.jsonl"], 0.5)
        assert (len(train), queries(val)) == (10, ["v.jsonl 0", "v.jsonl 1"])

    def test_without_one_the_share_is_split_off(self):
        numbered("a.jsonl", 10)
        train, val = self.both(["a.jsonl"], [], 0.3, seed=7)
        assert (len(train), len(val)) == (7, 3)

    @pytest.fixture
    def images(self, golden_image):
        """Files of different content, in the eyes of a hash."""
        for number in range(12):
            Image.new("L", (4, 4), 20 * number).save(f"{number}.png")
        return [f"{number}.png" for number in range(12)]

    def rows_on(self, *groups: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {"query": f"q{number}", "response": "r", "images": list(group)}
            for number, group in enumerate(groups)
        ]

    def test_samples_on_one_image_stay_together(self, images):
        """Also those that two images connect."""
        rows = self.rows_on(*[[name] for name in images for _ in range(4)], images[:2], images[4:6])
        write("a.jsonl", rows)
        for seed in range(10):
            train, val = self.both(["a.jsonl"], [], 0.2, seed=seed)
            seen = [
                {image.digest for outline in part.outlines for image in outline.images}
                for part in (train, val)
            ]
            assert not seen[0] & seen[1]
            assert 4 <= len(val) <= 15
            assert len(train) + len(val) == len(rows)

    def test_an_image_of_most_samples_connects_nothing(self, images):
        """A reference or a blank image."""
        write("a.jsonl", self.rows_on(*[[images[0], name] for name in images[1:]]))
        train, val = self.both(["a.jsonl"], [], 0.2)
        assert (len(train), len(val)) == (9, 2)

    def test_one_image_alone_is_split_and_said(self, images, capsys):
        write("a.jsonl", self.rows_on(*[[images[0]]] * 10))
        train, val = self.both(["a.jsonl"], [], 0.2)
        assert (len(train), len(val)) == (8, 2)
        assert "2 of 2 validation records have an image" in capsys.readouterr().err

    def test_equal_records_stay_together(self):
        write("a.jsonl", [{"query": f"q{number // 2}", "response": "r"} for number in range(20)])
        train, val = self.both(["a.jsonl"], [], 0.3)
        assert (len(train), len(val)) == (14, 6)
        assert not set(queries(train)) & set(queries(val))

    def test_equal_records_of_both_sets_are_counted(self, capsys):
        numbered("a.jsonl", 5)
        write("v.jsonl", [{"query": f"a.jsonl {i}", "response": "r"} for i in (3, 4, 5)])
        self.both(["a.jsonl"], ["v.jsonl"], 0)
        assert "2 of 3 validation records are training records too" in capsys.readouterr().err

    def test_a_skipped_record_moves_no_other_one(self, images):
        write("a.jsonl", self.rows_on(*[[name] for name in images]))
        for gone in (2, 5, 9):
            before = [queries(part) for part in self.both(["a.jsonl"], [], 0.4, seed=3)]
            content = Path(images[gone]).read_bytes()
            Path(images[gone]).unlink()
            skipping = {"seed": 3, "on_bad_sample": "skip"}
            after = [queries(part) for part in self.both(["a.jsonl"], [], 0.4, **skipping)]
            lost = f"{{{images[gone]}}}q{gone}"
            assert after == [[name for name in part if name != lost] for part in before]
            Path(images[gone]).write_bytes(content)

    def test_a_run_keeps_its_validation_records(self, tmp_path):
        numbered("a.jsonl", 30)
        _, val = self.both(["a.jsonl"], [], 0.2, seed=1)
        write_split(tmp_path, val.positions)
        history = read_history(tmp_path)
        assert queries(self.both(["a.jsonl"], [], 0.2, seed=2, history=history)[1]) == queries(val)
        # Runs of older releases drew among the usable records.
        (tmp_path / "split.json").unlink()
        old = self.both(["a.jsonl"], [], 0.2, seed=1, history=read_history(tmp_path))[1]
        chosen = sorted(random.Random(1).sample(range(30), 6))
        assert queries(old) == [f"a.jsonl {index}" for index in chosen]

    def test_one_sample_is_not_split(self):
        numbered("a.jsonl", 1)
        assert [len(part) for part in self.both(["a.jsonl"], [], 0.5)] == [1, 0]

    def test_the_problems_of_both_are_shown_together(self):
        write("a.jsonl", ["{", '{"query": "q"}'])
        write("v.jsonl", [{"query": "", "response": "r"}])
        found = message(lambda: self.both(["a.jsonl", "no.jsonl"], ["v.jsonl"], 0.5))
        assert [line for line in found.splitlines() if not line.startswith(" hint")] == [
            "a.jsonl:1: not JSON: Expecting property name enclosed in double quotes at column 2",
            "a.jsonl:2: no reply among the columns that are known (columns: query)",
            "no.jsonl: no such file",
            'v.jsonl:1: "query" is empty',
        ]


class TestBadRecords:
    def test_one_is_said_alone(self):
        write("a.jsonl", [{"query": "q", "response": "r"}, {"query": "q", "response": ""}])
        with pytest.raises(DataError, match=r'^a\.jsonl:2: "response" is empty\n hint: '):
            load("a.jsonl")

    @pytest.mark.parametrize(("count", "rest"), [(20, 0), (21, 1), (57, 37)])
    def test_twenty_are_shown_and_the_rest_is_counted(self, count, rest):
        write("a.jsonl", [{"query": "q", "response": ""}] * count)
        with pytest.raises(CollectedError) as error:
            load("a.jsonl")
        assert len(error.value.problems) == count
        shown = [f'a.jsonl:{i + 1}: "response" is empty' for i in range(20)]
        text = str(error.value).splitlines()
        assert text[:40:2] == shown
        assert text[40:] == ([f"... and {rest} more"] if rest else [])

    def test_problems_of_all_kinds_are_in_the_order_of_the_file(self, image):
        Path("broken.png").write_bytes(b"x")
        write(
            "a.jsonl",
            [
                {"query": "q", "response": "r", "images": ["no.png"]},
                "x",
                {"query": "q", "response": "r", "images": [image]},
                {"query": 12345, "response": "r"},
                {"query": "a" * 31, "response": "r"},
                {"query": "q", "response": "r", "images": [image, "broken.png"]},
                {"query": "<image>", "response": "r"},
            ],
        )
        found = message(lambda: load("a.jsonl", max_length=31))
        assert [line for line in found.splitlines() if not line.startswith(" hint")] == [
            "a.jsonl:1: no.png: no such image",
            "a.jsonl:2: not JSON: Expecting value at column 1",
            'a.jsonl:4: "query": found a number, 12345; text is allowed',
            "a.jsonl:5: 32 tokens, at most 31 are allowed",
            "a.jsonl:6: broken.png: not an image of a known format",
            "a.jsonl:7: 0 images listed, 1 <image> in the text",
        ]

    def test_one_broken_image_is_said_at_every_record_that_names_it(self):
        write("a.jsonl", [{"query": "q", "response": "r", "images": ["no.png"]}] * 2)
        found = message(lambda: load("a.jsonl"))
        assert found.count("no.png: no such image") == 2
        assert "a.jsonl:2: no.png" in found

    def test_skipping(self, capsys):
        rows = [{"query": str(i), "response": "r"} for i in range(5)]
        write("a.jsonl", [rows[0], "{", rows[1], {"query": ""}, rows[2], {}, rows[3]])
        assert queries(load("a.jsonl", on_bad_sample="skip")) == ["0", "1", "2", "3"]
        assert capsys.readouterr().err == (
            "a.jsonl: JSON Lines, a question and a reply: query, response\n"
            "warning: a.jsonl: none of the 4 samples has an image\n"
            "warning: skipped 3 bad records (1 not JSON, 1 no reply among the columns that are "
            "known, 1 no question and no reply among the columns that are known), the first: "
            "a.jsonl:2: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        )

    def test_skipping_one(self, capsys):
        write("a.jsonl", [{"query": "q", "response": "r"}, {}])
        load("a.jsonl", on_bad_sample="skip")
        assert "warning: skipped 1 bad record: a.jsonl:2: no question and no reply among" in (
            capsys.readouterr().err
        )

    def test_skipping_all(self):
        write("a.jsonl", [{}])
        write("b.jsonl", ["x"])
        assert message(lambda: load("a.jsonl", "b.jsonl", on_bad_sample="skip")) == (
            "a.jsonl, b.jsonl: no usable sample is left\n"
            " hint: correct the records; the warnings above name the first that was skipped"
        )

    def test_a_file_that_cannot_be_read_is_never_skipped(self):
        numbered("a.jsonl", 3)
        write("b.jsonl", ["x"])
        found = message(
            lambda: load("no.jsonl", "b.jsonl", "a.jsonl", "a.jsonl#9", on_bad_sample="skip")
        )
        assert [line for line in found.splitlines() if not line.startswith(" hint")] == [
            "no.jsonl: no such file",
            "a.jsonl#9: no record is left (3 are taken already)",
        ]

    @pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.csv", "query,response\n")])
    def test_a_file_without_records(self, name, text):
        Path(name).write_text(text)
        expected = f"{name}: no records\n hint: add some, or leave it out"
        assert message(lambda: load(name)) == expected
        assert message(lambda: load(f"{name}#1", on_bad_sample="skip")) == expected


LONG = {
    "history": [["<image>aaaa", "bbbb"], ["cccc", "dddd"], ["<image>eeee", "ffff"]],
    "query": "gggg<image>",
    "response": "hhhh",
}
TURNS = ["{1}aaaa", "bbbb", "cccc", "dddd", "{2}eeee", "ffff", "gggg{3}", "hhhh"]


def tokens(turns: Sequence[str]) -> int:
    text = "".join(turns)
    images = len(re.findall(r"\{\d\}", text))
    return len(text) + images * (IMAGE_TOKENS - 3)


class TestLongSamples:
    @pytest.fixture
    def long(self, golden_image) -> str:
        for name in "123":
            Path(name).write_bytes(golden_image)
        assert tokens(TURNS) == 62
        return write("a.jsonl", [{**LONG, "images": ["1", "2", "3"]}])

    @pytest.mark.parametrize("limit", [None, 62, 63])
    @pytest.mark.parametrize("on_long", ["error", "skip", "truncate-history"])
    def test_what_fits_is_left_alone(self, long, limit, on_long):
        data = load(long, max_length=limit, on_long=on_long)
        assert flat(data.conversations[0]) == TURNS

    def test_error(self, long):
        assert message(lambda: load(long, max_length=61)) == (
            "a.jsonl:1: 62 tokens, at most 61 are allowed\n"
            " hint: raise --max-length, or use --on-long skip or truncate-history"
        )

    def test_the_hint_of_inference_names_no_flag_of_training(self, long):
        prompt = tokens(TURNS[:-1])
        assert message(lambda: load(long, max_length=prompt - 1, need_response=False)) == (
            f"a.jsonl:1: {prompt} tokens, at most {prompt - 1} are allowed\n"
            " hint: shorten it, or leave such records out with --on-bad-sample skip"
        )

    def test_inference_measures_the_prompt_alone(self, long):
        prompt = tokens(TURNS[:-1])
        assert prompt < tokens(TURNS)
        data = load(long, need_response=False, max_length=prompt)
        assert flat(data.conversations[0]) == TURNS
        assert data.outlines[0].tokens == prompt

    def test_skip(self, long, capsys):
        numbered("b.jsonl", 2)
        data = load(long, "b.jsonl", max_length=61, on_long="skip")
        assert queries(data) == ["b.jsonl 0", "b.jsonl 1"]
        assert capsys.readouterr().err == (
            "warning: a.jsonl: skipped 1 sample of more than 61 tokens\n"
            "a.jsonl: JSON Lines, a question and a reply: history, query, response, images\n"
            "b.jsonl: JSON Lines, a question and a reply: query, response\n"
            "warning: b.jsonl: none of the 2 samples has an image\n"
        )

    @pytest.mark.parametrize("limit", range(18, 64))
    def test_history_goes_by_whole_exchanges_from_the_oldest(self, long, limit):
        # Reference: the longest tail of whole exchanges that fits.
        tails = [TURNS[start:] for start in range(0, len(TURNS), 2)]
        expected = next(tail for tail in tails if tokens(tail) <= limit)
        data = load(long, max_length=limit, on_long="truncate-history")
        (made,) = data.conversations
        assert flat(made) == expected
        assert [turn.role for turn in made.turns] == ["user", "assistant"] * (len(expected) // 2)
        kept = [ref.given for ref in made.images]
        assert kept == re.findall(r"\{(\d)\}", "".join(expected))
        assert len(data[0]) == tokens(expected) <= limit

    def test_system_and_place_stay(self, long):
        write("b.jsonl", [{**LONG, "images": ["1", "2", "3"], "system": "be brief"}])
        (made,) = load("b.jsonl", max_length=20, on_long="truncate-history").conversations
        assert (made.system, made.place, len(made.turns)) == ("be brief", "b.jsonl:1", 2)

    def test_a_question_without_reply_keeps_its_last_turn(self, golden_image, long):
        row = {**LONG, "images": ["1", "2", "3"]}
        del row["response"]
        write("b.jsonl", [row])
        (made,) = load(
            "b.jsonl", max_length=14, on_long="truncate-history", need_response=False
        ).conversations
        assert flat(made) == ["gggg{3}"]

    def test_what_is_too_long_without_its_history_is_refused(self, long):
        assert message(lambda: load(long, max_length=17, on_long="truncate-history")) == (
            "a.jsonl:1: 62 tokens, at most 17 are allowed\n hint: it is too long even without its "
            "history; raise --max-length, or use --on-long skip"
        )
        numbered("b.jsonl", 1)
        assert queries(
            load(long, "b.jsonl", max_length=17, on_long="truncate-history", on_bad_sample="skip")
        ) == ["b.jsonl 0"]


@pytest.mark.parametrize("exchanges", [1, 2, 7, 200])
@pytest.mark.parametrize("limit", [4, 9, 30, 777])
def test_a_long_history_is_cut_by_bisection(exchanges, limit):
    """To the same exchanges as dropping one at a time, in a few encodings."""
    turns = tuple(
        Turn("user" if number % 2 == 0 else "assistant", ("word"[: 1 + number % 4],))
        for number in range(2 * exchanges)
    )
    whole = Conversation(turns)
    fitting = [
        dropped
        for dropped in range(exchanges)
        if encode.lengths([whole.without_first_exchanges(dropped)])[0] <= limit
    ]
    calls = []

    class Counting(Letters):
        def lengths(self, conversations: Sequence[Conversation]) -> list[int]:
            calls.extend(conversations)
            return super().lengths(conversations)

    length = encode.lengths([whole])[0]
    options = dataclasses.replace(OPTIONS, on_long="truncate-history", max_length=limit)
    if not fitting:
        with pytest.raises(DataError, match="too long even without its history"):
            fit(whole, Counting(), options, length)
    elif fitting[0]:
        assert fit(whole, Counting(), options, length)[0] == fitting[0]
    assert len(calls) <= 9


@in_dialogues
class TestEachFactOnce:
    """An image's digest and size are found when the data is checked, and kept for the run."""

    @pytest.fixture
    def opened(self, monkeypatch) -> Counter[str]:
        """How often each file is opened."""
        counts: Counter[str] = Counter()

        def counting(file, *args, _open=io.open, **options):
            counts[str(file)] += 1
            return _open(file, *args, **options)

        monkeypatch.setattr("builtins.open", counting)
        monkeypatch.setattr("io.open", counting)
        return counts

    @pytest.fixture
    def sets(self, processor) -> Callable[[], tuple[Dataset, Dataset]]:
        """A function that reads two data files on the same two images."""
        for name, source in (("a.png", "chart.png"), ("b.jpg", "photo_a.jpg")):
            Path(name).write_bytes((GOLDEN / "images" / source).read_bytes())
        rows = [
            {"query": "<image>" * len(images) + str(index), "response": "r", "images": images}
            for index, images in enumerate((["a.png"], ["b.jpg"], ["a.png"], ["b.jpg", "a.png"]))
        ]
        rows.append({"query": "three", "response": "r", "images": ["a.png"] * 3})
        write("t.jsonl", rows)
        write("v.jsonl", rows[1:3])
        options = DataOptions(Reading(processor.chat.image_tag))
        encode = processor.encoder
        return lambda: load_train_and_val(["t.jsonl"], ["v.jsonl"], 0, encode, options)

    def test_each_image_is_opened_once(self, sets, opened):
        data = sets()
        assert {name: opened[name] for name in ("a.png", "b.jpg")} == {"a.png": 1, "b.jpg": 1}
        # No file is needed any more: neither opened nor looked up.
        for name in ("a.png", "b.jpg"):
            Path(name).unlink()
        outlined = [outline.images for part in data for outline in part.outlines]
        for _ in range(2):
            assert [sample.images for part in data for sample in part] == outlined
        groups = make_schedule(vlft.SftConfig(), data[0]).groups
        assert groups[0] == groups[2] == groups[4] != groups[1] == groups[3]
        assert {image.digest for image in distinct_images(data)} == {groups[0], groups[1]}
        assert (opened["a.png"], opened["b.jpg"]) == (1, 1)

    def test_an_image_written_anew_is_the_same_until_the_run_ends(
        self, sets, shared_model, processor
    ):
        """Its features are those of the image that was checked."""
        train, val = sets()
        images = distinct_images((train, val))
        plan = CachePlan("memory", "aligned", Path(), "")
        cached = fill(plan, shared_model, processor, images)
        before = [cached.of(sample.images).inputs["features"] for sample in train]
        Image.new("RGB", (1500, 20)).save("a.png")
        for sample, expected in zip(train, before, strict=True):
            assert torch.equal(cached.of(sample.images).inputs["features"], expected)
            tokens = (sample.input_ids == processor.chat.image_token_id).sum()
            assert len(expected) == tokens
        # Features of other bytes must never be kept under this image's key.
        with pytest.raises(DataError, match=r"^a\.png: the image has changed since"):
            fill(plan, shared_model, processor, images)
        assert {i.digest for i in distinct_images(sets())} != {i.digest for i in images}

    def test_records_that_were_never_checked_are_encoded_too(self, processor, sets):
        train, _ = sets()
        for index, images in enumerate((["a.png"], ["b.jpg"])):
            row = {"query": f"<image>{index}", "response": "r", "images": images}
            assert processor.encode(row).images == train[index].images


@pytest.mark.only_siglip
def test_lengths_are_those_of_the_real_encoder(processor, golden_image):
    # One image more costs as many tokens as it becomes, and the limit counts every token.
    Path("a.png").write_bytes(golden_image)
    rows = [
        {"query": "<image>" * count + "What?", "response": "That.", "images": ["a.png"] * count}
        for count in (1, 2, 3)
    ]
    write("a.jsonl", rows)
    data = load_dataset(["a.jsonl"], processor.encoder, OPTIONS)
    lengths = [len(sample) for sample in data]
    image = processor.pixels.tokens
    assert [b - a for a, b in itertools.pairwise(lengths)] == [image, image]
    limited = dataclasses.replace(OPTIONS, max_length=lengths[1], on_long="skip")
    kept = load_dataset(["a.jsonl"], processor.encoder, limited)
    assert [len(sample) for sample in kept] == lengths[:2]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_the_checks_is_shown_at_a_terminal(image, monkeypatch, terminal):
    seen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=seen, force_terminal=terminal))
    rows = [{"query": "Hi", "response": "there", "images": [image]}] * 3
    assert len(load_dataset([write("a.jsonl", rows)], encode, OPTIONS)) == 3
    for words in ("checking images", "checking samples"):
        assert (words in seen.getvalue()) == terminal


class TestFlags:
    """What the data leave open, and the flags that decide it."""

    def test_a_column_that_no_record_has(self):
        write("a.jsonl", [{"query": "q", "label": "r", "id": 1}])
        data = load("a.jsonl", columns={"response": "label"})
        assert data.conversations[0].reply == "r"
        assert data.flags == {"--columns response=label"}
        options = dataclasses.replace(
            OPTIONS,
            reading=dataclasses.replace(READING, columns={"response": "label", "images": "x"}),
        )
        found = message(lambda: load_train_and_val(["a.jsonl"], [], 0, encode, options))
        assert found == (
            "--columns images=x: no record has the column 'x'\n"
            " hint: check its name; vlft check lists the columns"
        )

    def test_a_prompt_that_no_record_needs(self):
        write("a.jsonl", [{"caption": "r"}])
        write("b.jsonl", [{"query": "q", "response": "r"}])
        reading = dataclasses.replace(READING, prompt="Say.", columns={"response": "caption"})
        options = dataclasses.replace(OPTIONS, reading=reading)
        both = load_train_and_val(["a.jsonl"], ["b.jsonl"], 0, encode, options)
        assert [queries(data) for data in both] == [["Say."], ["q"]]
        reading = dataclasses.replace(READING, prompt="Say.")
        options = dataclasses.replace(OPTIONS, reading=reading)
        found = message(lambda: load_train_and_val(["b.jsonl"], [], 0, encode, options))
        assert found.startswith("--prompt: every record has a question of its own")

    def test_samples_of_one_record_stay_together(self):
        rows = [{"question": f"q{i}", "answers": [f"{i}a", f"{i}b", f"{i}a"]} for i in range(6)]
        write("a.jsonl", rows)
        reading = dataclasses.replace(READING, answers="each")
        train, val = load_train_and_val(
            ["a.jsonl"], [], 0.3, encode, dataclasses.replace(OPTIONS, reading=reading)
        )
        assert len(train) + len(val) == 12
        assert not {position[1] for position in train.positions} & {p[1] for p in val.positions}
        assert [item.reply for item in load("a.jsonl", answers="most").conversations] == [
            f"{i}a" for i in range(6)
        ]

    def test_questions_of_a_record_as_samples(self, image):
        turns = [["<image>one", "1"], ["two", "2"], ["three", "3"]]
        texts = [{"user": q, "assistant": a} for q, a in turns]
        write("a.jsonl", [{"texts": texts, "images": [image]}])
        assert [flat(item) for item in load("a.jsonl", qa="samples").conversations] == [
            ["{a.png}one", "1"], ["{a.png}two", "2"], ["{a.png}three", "3"],
        ]  # fmt: skip
        assert len(load("a.jsonl").conversations[0].turns) == 6

    def test_one_question_for_the_whole_file(self):
        rows = [{"caption": "c", "n": i} | ({"more": 1} if i else {}) for i in range(30)]
        write("a.jsonl", rows)
        assert message(lambda: load("a.jsonl")) == (
            "a.jsonl:1: no question and no reply among the columns that are known "
            "(columns: caption, n, more) (so are all 30 records)\n hint: name it: --columns "
            "query=COLUMN, or --prompt TEXT if it is the same for all; --columns response=COLUMN"
        )

    def test_a_pattern_of_folders_and_their_parts(self):
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        Path("shards").mkdir()
        for name, start in (("b", 3), ("a", 0)):
            rows = [{"query": str(i), "response": "r"} for i in range(start, start + 3)]
            parquet.write_table(
                arrow.Table.from_pylist(rows), f"shards/{name}.parquet", row_group_size=2
            )
        assert queries(load("shards")) == list("012345")
        assert len(load("shards#4")) == 4
        assert load("shards").conversations[5].place == "shards:6"
