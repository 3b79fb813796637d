"""Several checkpoints that answer side by side in one file."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl
from served import make_adapter

import vlft
from vlft.errors import CheckpointError, ConfigError, UsageError
from vlft.inference import side_by_side
from vlft.inference.replier import Replier

ROWS = [
    {"query": "<image>What is it?", "images": ["photo_a.jpg"]},
    {"query": "Hi."},
    {"query": "<image>What is number 1?", "images": ["photo_a.jpg"], "response": "It is 1."},
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two of the LLM, and one of the aligner and the tower too, with features of its own."""
    home = tmp_path_factory.mktemp("adapters")
    trained = {"train_aligner": True, "train_vision": True}
    return [
        make_adapter(SIGLIP.folder, home / "a", 1),
        make_adapter(SIGLIP.folder, home / "b", 2),
        make_adapter(SIGLIP.folder, home / "c", 3, target_modules="ALL", **trained),
    ]


@pytest.fixture
def infer(tmp_path):
    """A function that answers the rows."""
    file = write_jsonl(tmp_path / "ask.jsonl", ROWS)

    def answer(name, *folders, **settings):
        given = {
            "dataset": (str(file),), "image_root": GOLDEN / "images", "batch_size": 1,
            "max_new_tokens": 6, "show_samples": 0, "device": "cpu", **settings,
        }  # fmt: skip
        output = tmp_path / f"{name}.jsonl"
        return vlft.infer(
            vlft.InferConfig(model=str(SIGLIP.folder), ckpt_dir=folders, output=output, **given)
        )

    return answer


def test_lines_are_those_of_each_alone(infer, adapters, monkeypatch):
    alone = [infer(f"alone-{number}", one).rows for number, one in enumerate(adapters)]
    loaded = []
    original = side_by_side.load_model
    monkeypatch.setattr(
        side_by_side, "load_model", lambda *given: loaded.append(1) or original(*given)
    )
    result = infer("together", *adapters)
    assert loaded == [1]
    rows = result.rows
    names = [row.pop("checkpoint") for row in rows]
    assert names == [f"{one.parent.name}/{one.name}" for one in adapters] * len(ROWS)
    assert rows == [some[number] for number in range(len(ROWS)) for some in alone]
    # They say different things, or else the test would see nothing.
    assert len({json.dumps([row["response"] for row in some]) for some in alone}) == 3
    header = json.loads(result.output.with_suffix(".settings.json").read_text())
    assert header["checkpoints"] == dict(zip(names, map(str, adapters), strict=False))
    assert header["settings"]["max_new_tokens"] == 6
    assert {name.split("/")[1] for name in header["adapter"]} == {"a", "b", "c"}


def test_stopped_anywhere_it_goes_on_to_the_same_file(infer, adapters, monkeypatch):
    whole = infer("whole", *adapters[:2]).output.read_bytes()
    original, calls = Replier._generate, []

    def stopping(self, *given):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(Replier, "_generate", stopping)
    for _ in range(3):
        with suppress(KeyboardInterrupt):
            result = infer("stopped", *adapters[:2])
    assert result.output.read_bytes() == whole
    assert len(calls) == 8
    with pytest.raises(CheckpointError, match="see checkpoint"):
        infer("stopped", *adapters[1::-1])


def test_two_are_compared(infer, adapters):
    result = infer("two", *adapters[:2])
    found = vlft.evaluate(vlft.EvalConfig(results=(result.output,), metric=("cer",)))
    assert found.summary["records"] == 1
    assert "difference" in found.summary["metrics"]["cer"]
    parents = adapters[0].parent.name
    expected = [f"two.{parents}-{name}.scores.jsonl" for name in "ab"]
    assert [path.name for path in found.scores] == expected
    (row,) = [row for row in result.rows if row["label"] and row["checkpoint"].endswith("b")]
    assert json.loads(found.scores[1].read_text())["reply"] == row["response"]
    three = infer("three", *adapters)
    with pytest.raises(ConfigError, match="found 3 sets of answers, one or two are allowed"):
        vlft.evaluate(vlft.EvalConfig(results=(three.output,), metric=("cer",)))


def test_lines_are_data_again(infer, adapters):
    lines = infer("data", *adapters[:2]).output
    again = infer("again", dataset=(str(lines),))
    assert [row["query"] for row in again.rows] == [row["query"] for row in ROWS for _ in "ab"]


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dataset": (), "image_root": None, "batch_size": 8}, "a chat is with one"),
            ({"merge_lora": True}, "--merge-lora: found 2 checkpoints, whose adapters"),
        ],
    )
    def test_settings(self, adapters, settings, message):
        given = {"dataset": ("a.jsonl",), **settings}
        given = {k: v for k, v in given.items() if k in ("dataset", "merge_lora")}
        with pytest.raises(UsageError, match=message):
            vlft.infer(
                vlft.InferConfig(model=str(SIGLIP.folder), ckpt_dir=tuple(adapters[:2]), **given)
            )

    def test_one_twice(self, infer, adapters):
        with pytest.raises(ConfigError, match=r"--ckpt-dir: \S*/a twice"):
            infer("twice", adapters[0], adapters[0])

    def test_another_base(self, adapters, infer, tmp_path):
        run = vlft.sft(
            vlft.SftConfig(
                model=str(SIGLIP.folder), image_root=GOLDEN / "images", max_steps=1,
                dataset=(str(write_jsonl(tmp_path / "train.jsonl", make_rows(6))),),
                output_dir=tmp_path / "output", tuner="full", device="cpu", show_sample=False,
            )
        ).run  # fmt: skip
        with pytest.raises(UsageError, match="holds a whole model"):
            infer("whole", adapters[0], run)
