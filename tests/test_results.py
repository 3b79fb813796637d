"""Result files: what they say of a record, how they are continued, what else can read them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN, PHOTOS, SIGLIP, write_jsonl
from safetensors.torch import load_file, save_file

import vlft
from vlft import files
from vlft.checkpoints.locate import describe
from vlft.data.conversation import Conversation, Origin, Turn
from vlft.data.dataset import load_dataset
from vlft.data.options import DataOptions, Reading
from vlft.errors import CheckpointError, ConfigError
from vlft.inference.columns import FIRST_LINES, Columns
from vlft.inference.results import read_results


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(tmp_path):
    """Three images under names of their own in the working folder."""
    for number, name in enumerate(PHOTOS):
        shutil.copy(GOLDEN / "images" / name, tmp_path / f"{number}.img")
    return [f"{number}.img" for number in range(3)]


def answer(*files, model=SIGLIP.folder, **settings):
    given = {"max_new_tokens": 3, "show_samples": 0, "device": "cpu", **settings}
    return vlft.infer(vlft.InferConfig(model=str(model), dataset=files, **given))


def header(path):
    return json.loads(path.with_suffix(".settings.json").read_text())


class TestLines:
    def test_what_a_record_has_besides_is_kept(self, images, tmp_path):
        rows = [
            {"query": "<image>?", "images": [images[0]], "id": "x-1", "meta": {"page": 3}},
            {"query": "<image>?", "images": ["gone.png"], "id": "x-2"},
            {"query": "Hi.", "response": "Ho.", "id": "x-3", "meta": {"page": None}, "_a": 1},
        ]
        write_jsonl(tmp_path / "q.jsonl", rows)
        result = answer("q.jsonl", output=tmp_path / "o.jsonl", on_bad_sample="skip")
        found = [
            {name: row[name] for name in ("id", "meta", "file", "line", "label", "images")}
            for row in result.rows
        ]
        assert found == [
            {"id": "x-1", "meta": {"page": 3}, "file": "q.jsonl", "line": 1, "label": "",
             "images": [str(tmp_path / images[0])]},
            {"id": "x-3", "meta": {"page": None}, "file": "q.jsonl", "line": 3, "label": "Ho.",
             "images": []},
        ]  # fmt: skip
        assert header(result.output)["skipped"] == [
            {"record": "q.jsonl:2: gone.png", "reason": "no such image"}
        ]

    def test_names_are_in_the_same_order_without_labels(self, tmp_path):
        write_jsonl(tmp_path / "q.jsonl", [{"query": "Hi."}])
        row = answer("q.jsonl", output=tmp_path / "o.jsonl").rows[0]
        names = ["query", "response", "finish", "label", "images", "image_keys", "file", "line"]
        assert list(row) == names

    def test_settings_stand_beside_the_lines(self, tmp_path):
        write_jsonl(tmp_path / "q.jsonl", [{"query": "Hi."}])
        result = answer("q.jsonl", output=tmp_path / "o.jsonl", repetition_penalty=1.5)
        assert header(result.output)["settings"]["repetition_penalty"] == 1.5
        assert "repetition_penalty" not in result.output.read_text()

    def test_they_are_data_again(self, images, tmp_path, monkeypatch):
        """In another folder, for training on the replies and for answering anew."""
        rows = [
            {"query": "<image>?", "images": [images[0]], "response": "7", "id": 4},
            {"query": "And <image>?", "images": images[1:], "history": [["<image>", "a"]]},
            {"query": "Hi.", "system": "Be brief."},
        ]
        write_jsonl(tmp_path / "q.jsonl", rows)
        first = answer("q.jsonl", output=tmp_path / "a" / "o.jsonl").rows
        (tmp_path / "b").mkdir()
        monkeypatch.chdir(tmp_path / "b")
        second = answer("../a/o.jsonl", output=tmp_path / "p.jsonl").rows
        for name in ("query", "response", "label", "images", "image_keys", "history", "system"):
            assert [row[name] for row in first] == [row[name] for row in second]
        processor = describe(SIGLIP.folder).processor()
        options = DataOptions(Reading(processor.family.image_tag))
        trained = load_dataset(["../a/o.jsonl"], processor.encoder, options)
        assert [item.reply for item in trained.conversations] == [r["response"] for r in first]

    def test_lines_of_older_versions_are_data_too(self, images, tmp_path):
        line = {"query": "<image>?", "label": "7", "images": images[:1], "response": "9",
                "generation": {"seed": 1}}  # fmt: skip
        write_jsonl(tmp_path / "old.jsonl", [line])
        assert answer("old.jsonl", output=tmp_path / "o.jsonl").rows[0]["label"] == "7"
        # A label of other data is only another column.
        write_jsonl(tmp_path / "own.jsonl", [{"query": "q", "label": "7"}])
        assert answer("own.jsonl", output=tmp_path / "l.jsonl").rows[0]["label"] is None

    def test_showing_some_reads_no_more(self, tmp_path):
        file = write_jsonl(
            tmp_path / "o.jsonl", [{"query": q, "response": "", "images": []} for q in "ab"]
        )
        file.write_text(file.read_text() + "no line\n")
        assert [row["query"] for row in read_results(tmp_path / "o.jsonl", 2)] == ["a", "b"]


class TestContinuing:
    @pytest.fixture
    def half(self, images, tmp_path):
        """Three records on images, two of them answered; a function that goes on."""
        rows = [{"query": "<image>?", "images": [name]} for name in images]
        write_jsonl(tmp_path / "q.jsonl", rows)
        target = tmp_path / "o.jsonl"
        answer("q.jsonl", output=target)
        whole = target.read_bytes()
        target.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))

        def go_on(**settings):
            answer("q.jsonl", output=target, **settings)
            return target.read_bytes() == whole

        return go_on

    def test_the_same(self, half):
        assert half(batch_size=1)

    def test_a_full_disk_leaves_no_half_of_a_header(self, half, tmp_path, monkeypatch):
        (tmp_path / "o.jsonl").unlink()
        header = tmp_path / "o.settings.json"
        before = header.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(files, "flush", lambda path: os.truncate(path, 9) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                half(overwrite=True)
        assert header.read_bytes() == before
        assert not list(tmp_path.glob(".*.part"))
        assert half()

    @pytest.mark.parametrize(
        "damage",
        [{"images": [{"x": 1}]}, {"images": [[]]}, {"images": 3}, {"images": "[1]"},
         {"response": None}, {"response": ["a"]}],
        ids=str,
    )  # fmt: skip
    def test_a_damaged_line_is_told_before_any_work(self, half, damage, tmp_path):
        """Also in the fields that may differ: showing the lines at the end would fail on them."""
        target = tmp_path / "o.jsonl"
        first, second = target.read_text().splitlines()
        lines = [first, json.dumps(json.loads(second) | damage)]
        target.write_text("".join(line + "\n" for line in lines))
        before = target.read_bytes()
        with pytest.raises(CheckpointError, match="line 2 is no result line") as error:
            half(show_samples=5)
        assert error.value.place == "o.jsonl"
        assert target.read_bytes() == before

    def test_a_root_is_no_file(self, half):
        with pytest.raises(ConfigError, match="names no file"):
            answer("q.jsonl", output=Path("/"))

    def test_images_that_were_moved_are_the_same(self, half, images, tmp_path):
        (tmp_path / "moved").mkdir()
        for name in images:
            shutil.move(name, f"moved/{name}")
        assert not half(image_root=tmp_path / "moved")
        rows = read_results(tmp_path / "o.jsonl")
        assert [row["images"][0].split("/")[-2] == "moved" for row in rows] == [False, False, True]

    def test_other_weights_of_the_same_files(self, half):
        with pytest.raises(CheckpointError, match="made with other settings, dtype float32"):
            half(dtype="bfloat16")

    def test_another_image_under_its_name(self, half, images):
        shutil.copy(images[0], images[1])
        with pytest.raises(CheckpointError, match="line 2 answers another record, see image_keys"):
            half()
        assert not half(overwrite=True)

    def test_another_folder_of_images(self, half, images, tmp_path):
        (tmp_path / "other").mkdir()
        for name, other in zip(images, images[::-1], strict=True):
            shutil.copy(name, f"other/{other}")
        with pytest.raises(CheckpointError, match="line 1 answers another record, see image_keys"):
            half(image_root=tmp_path / "other")

    @pytest.mark.parametrize("changed", ["weights", "tokenizer_config.json"])
    def test_another_model_of_the_same_name(self, images, tmp_path, changed):
        shutil.copytree(SIGLIP.folder, tmp_path / "model")
        write_jsonl(tmp_path / "q.jsonl", [{"query": "Hi."}])
        answer("q.jsonl", model="model")
        if changed == "weights":
            path = tmp_path / "model" / "model.safetensors"
            tensors = load_file(path)
            name = "language_model.lm_head.weight"
            save_file({**tensors, name: tensors[name].roll(1, 0)}, path)
        else:
            path = tmp_path / "model" / changed
            path.write_text(path.read_text() + "\n")
        with pytest.raises(CheckpointError, match=f"made with (other|another) {changed}"):
            answer("q.jsonl", model="model")

    def test_a_file_of_an_older_version_says_why_not(self, half, tmp_path):
        (tmp_path / "o.settings.json").unlink()
        with pytest.raises(CheckpointError, match="older versions wrote none") as error:
            half()
        assert "name another --output" in str(error.value)

    def test_more_lines_than_records(self, half, tmp_path):
        write_jsonl(tmp_path / "q.jsonl", [{"query": "<image>?", "images": ["0.img"]}])
        with pytest.raises(CheckpointError, match="more lines than the data has records, 1"):
            half()

    def test_records_that_are_added_later(self, half, images, tmp_path):
        lines = (tmp_path / "q.jsonl").read_text()
        (tmp_path / "q.jsonl").write_text(lines + '{"query": "Hi."}\n')
        assert not half()
        assert len(read_results(tmp_path / "o.jsonl")) == 4
        (tmp_path / "q.jsonl").write_text(lines + '{"query": "Hi.", "id": 1}\n')
        with pytest.raises(CheckpointError, match="records need other columns, see id"):
            half()

    @pytest.mark.parametrize(("size", "temperature"), [(1, 0.0), (1, 1.0), (2, 1.0)])
    def test_draws_are_of_the_record(self, tmp_path, size, temperature):
        """One by one, in batches and continued; the same question gets other replies."""
        write_jsonl(tmp_path / "q.jsonl", [{"query": "Hi."}] * 6)
        whole = answer("q.jsonl", output=tmp_path / "a.jsonl", temperature=temperature).output
        for name in ("jsonl", "settings.json"):
            shutil.copy(f"a.{name}", f"b.{name}")
        part = tmp_path / "b.jsonl"
        part.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:3]))
        answer("q.jsonl", output=part, temperature=temperature, batch_size=size)
        assert part.read_bytes() == whole.read_bytes()
        replies = {row["response"] for row in read_results(part)}
        assert len(replies) == (6 if temperature else 1)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("2024.05.test.jsonl", "2024.06.test.jsonl"),
        ("a.b.jsonl", "a.c.jsonl"),
        ("test.json", "test.csv"),
    ],
)
def test_data_files_share_no_default_name(tmp_path, one, two):
    outputs = []
    for name in (one, two):
        text = "query\nHi.\n" if name.endswith("csv") else '{"query": "Hi."}\n'
        text = f"[{text}]" if name.endswith("json") else text
        (tmp_path / name).write_text(text)
        outputs.append(answer(f"{name}#1").output)
    assert outputs[0] != outputs[1]


def conversation(**values):
    label = values.pop("label", None)
    system = values.pop("system", None)
    turns = [Turn("user", ("q",))] + [Turn("assistant", (label,))] * (label is not None)
    return Conversation(tuple(turns), system, "", Origin("f", 1, **values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"label": [None, "x"]}, ["", "x"]),
        ({"label": [None, None]}, [None, None]),
        ({"id": [1, "a", None]}, ["1", "a", ""]),
        ({"id": [1, 2.5]}, [1, 2.5]),
        ({"id": [2**70, 1]}, [str(2**70), "1"]),
        ({"id": ["a", None]}, ["a", ""]),
        ({"meta": [{"a": 1}, {"b": "x"}]}, [{"a": 1}, {"b": "x"}]),
        ({"meta": [{"a": 1}, {"a": "x"}]}, ['{"a": 1}', '{"a": "x"}']),
        ({"meta": [{"box": [1, "ü"]}]}, ['{"box": [1, "ü"]}']),
        ({"meta": [float("nan"), 1.0]}, ["NaN", "1.0"]),
        ({"meta": [[], [1]]}, [[], [1]]),
        ({"meta": [*[[]] * FIRST_LINES, [1]]}, [*["[]"] * FIRST_LINES, "[1]"]),
        ({"id": [*[None] * FIRST_LINES, 7]}, [*[""] * FIRST_LINES, "7"]),
        ({"id": [*[1] * FIRST_LINES, 1.5]}, [*["1"] * FIRST_LINES, "1.5"]),
        ({"system": [None, "s", ""]}, ["default", "s", ""]),
    ],
)
def test_a_column_has_one_type(values, expected):
    (name,) = values
    items = [conversation(**{name: value}) for value in values[name]]
    columns = Columns(items, "default")
    assert [columns.row(item)[name] for item in items] == expected


def test_lists_that_come_late_are_read_again(images, tmp_path):
    rows = [{"query": "Hi."}] * FIRST_LINES + [
        {"query": "<image>?", "images": images[:1], "history": [["a", "b"]]}
    ]
    processor = describe(SIGLIP.folder).processor()
    options = DataOptions(Reading(processor.family.image_tag))
    encode = processor.encoder
    write_jsonl(tmp_path / "q.jsonl", [{**row, "response": "r"} for row in rows])
    items = load_dataset(["q.jsonl"], encode, options).conversations
    lines = [{**Columns(items, "").row(item), "response": "r"} for item in items]
    assert {type(line[name]) for line in lines for name in ("images", "history")} == {str}
    write_jsonl(tmp_path / "o.jsonl", lines)
    again = load_dataset(["o.jsonl"], encode, options)
    assert [item.turns[:-1] for item in again.conversations[:-1]] == [
        item.turns[:-1] for item in items[:-1]
    ]
    assert again.conversations[-1].images[0].facts == items[-1].images[0].facts
    assert len(again.conversations[-1].turns) == 4


def test_pyarrow_reads_it(images, tmp_path):
    reader = pytest.importorskip("pyarrow.json")
    rows = [{"query": "Hi.", "id": 1}, {"query": "<image>?", "images": images[:1], "id": "b"}]
    write_jsonl(tmp_path / "q.jsonl", rows)
    result = answer("q.jsonl", output=tmp_path / "o.jsonl")
    assert reader.read_json(result.output).to_pylist() == result.rows
