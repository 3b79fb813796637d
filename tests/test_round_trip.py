"""Generated conversations, written in every layout that can hold them, are read as they were."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import in_dialogues
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlft.data.containers.json_text import read_json
from vlft.data.containers.table import read_table
from vlft.data.conversation import ImageRef, Turn
from vlft.data.encode import IGNORE, encode
from vlft.data.options import Reading
from vlft.data.read import read_record
from vlft.data.records import Record
from vlft.data.references import BASE64

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.data.conversation import Conversation


@dataclass(frozen=True)
class Dialogue:
    system: str | None
    turns: tuple[Turn, ...]

    @property
    def images(self) -> list[str]:
        return [p.given for t in self.turns for p in t.parts if isinstance(p, ImageRef)]

    @property
    def texts(self) -> list[str]:
        return [
            "".join(p if isinstance(p, str) else "<image>" for p in t.parts) for t in self.turns
        ]


QUIET: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
# Angle brackets are left to the tags; text between them is tested elsewhere.
LETTERS = st.characters(blacklist_categories=["Cs"], blacklist_characters="<>\0\r")
TEXT = st.text(LETTERS, min_size=1, max_size=12).filter(str.strip)
NAME = st.text(LETTERS, min_size=1, max_size=8).filter(
    lambda name: name.strip() and ":" not in name and not BASE64.fullmatch(name * 20)
)
IMAGE = NAME.map(lambda name: ImageRef(Path("data") / f"{name}.png", f"{name}.png"))


@st.composite
def dialogues(draw: Callable[..., Any]) -> Dialogue:
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.one_of(TEXT, IMAGE), min_size=1, max_size=4))
        turns += [
            Turn("user", joined(parts)),
            Turn("assistant", (draw(TEXT),), draw(st.booleans())),
        ]
    if not any(turn.is_trained for turn in turns[1::2]):
        turns[-1] = replace(turns[-1], is_trained=True)
    return Dialogue(draw(st.none() | st.just("") | TEXT), tuple(turns))


def joined(parts: list[str | ImageRef]) -> tuple[str | ImageRef, ...]:
    made: list[str | ImageRef] = []
    for part in parts:
        if made and isinstance(part, str) and isinstance(made[-1], str):
            made[-1] += part
        else:
            made.append(part)
    return tuple(made)


def as_trained(dialogue: Dialogue, trained: bool | str) -> Dialogue:
    """The dialogue as layouts without losses hold it: all replies trained, or the last."""
    turns = [
        replace(turn, is_trained=trained is True or index == len(dialogue.turns) - 1)
        if turn.role == "assistant"
        else turn
        for index, turn in enumerate(dialogue.turns)
    ]
    return replace(dialogue, turns=tuple(turns))


def system_field(dialogue: Dialogue) -> dict[str, Any]:
    return {} if dialogue.system is None else {"system": dialogue.system}


def messages(
    dialogue: Dialogue, role: str, text: str, names: dict[str, str]
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if dialogue.system is not None:
        made.append({role: "system", text: dialogue.system})
    for turn, content in zip(dialogue.turns, dialogue.texts, strict=True):
        made.append({text: content, role: names[turn.role], "loss": turn.is_trained})
        if turn.role == "user":
            del made[-1]["loss"]
    return made


def openai(dialogue: Dialogue) -> Any:
    names = {"user": "user", "assistant": "assistant"}
    return {"messages": messages(dialogue, "role", "content", names), "images": dialogue.images}


def sharegpt(dialogue: Dialogue) -> Any:
    names = {"user": "Human", "assistant": "<|GPT|>"}
    return {"conversations": messages(dialogue, "from", "value", names), "image": dialogue.images}


def parts(dialogue: Dialogue) -> Any:
    def part(value: str | ImageRef) -> dict[str, Any]:
        if isinstance(value, str):
            return {"type": "text", "text": value, "index": None}
        return {"type": "image_url", "image_url": {"url": value.given}, "text": None}

    made = [
        {"role": t.role, "content": list(map(part, t.parts)), "weight": int(t.is_trained)}
        for t in dialogue.turns
    ]
    return {"messages": [m if m["role"] == "assistant" else {**m, "weight": 0} for m in made],
            **system_field(dialogue)}  # fmt: skip


def own_images(dialogue: Dialogue) -> Any:
    names = {"user": "<|User|>", "assistant": "<|Assistant|>"}
    made = messages(replace(dialogue, system=None), "role", "content", names)
    for message, turn in zip(made, dialogue.turns, strict=True):
        images = [part.given for part in turn.parts if isinstance(part, ImageRef)]
        message |= {"images": images} if images else {}
    return made if dialogue.system is None else {"conversation": made, **system_field(dialogue)}


def pairs(dialogue: Dialogue) -> Any:
    texts = dialogue.texts
    made = [{"user": q, "assistant": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]
    return {"texts": made, "images": dialogue.images, **system_field(dialogue)}


def native(dialogue: Dialogue) -> Any:
    *history, query, response = dialogue.texts
    before = [list(pair) for pair in zip(history[::2], history[1::2], strict=True)]
    return {"query": query, "response": response, "history": before, "images": dialogue.images,
            **system_field(dialogue)}  # fmt: skip


def alpaca(dialogue: Dialogue) -> Any:
    fields = native(dialogue)
    first, _, rest = fields.pop("query").partition("\n")
    return {"instruction": first, "input": rest, "output": fields.pop("response"), **fields}


def completion(dialogue: Dialogue) -> Any:
    rows = openai(dialogue)["messages"]
    for row in rows:
        row.pop("loss", None)
    return {"prompt": rows[:-1], "completion": rows[-1:], "images": dialogue.images}


LAYOUTS = {
    openai: None, sharegpt: None, parts: None, own_images: None,
    pairs: True, native: True, alpaca: True, completion: "last",
}  # fmt: skip


def read(fields: Any) -> Conversation:
    record = Record(fields, Path("a.jsonl"), 1)
    return read_record(record, Reading(), Path("data")).conversations[0]


def same(found: Conversation, dialogue: Dialogue) -> bool:
    return (found.system, found.turns) == (dialogue.system, dialogue.turns)


@settings(max_examples=1000, **QUIET)
@given(dialogues())
def test_of_every_layout(dialogue):
    for write, trained in LAYOUTS.items():
        if write is alpaca and not all(dialogue.texts[-2].partition("\n")):
            continue
        expected = dialogue if trained is None else as_trained(dialogue, trained)
        text = json.dumps(write(dialogue), ensure_ascii=len(dialogue.turns) > 2)
        fields = json.loads(text)
        assert same(read(fields), expected), write.__name__


@settings(max_examples=100, **QUIET)
@given(st.lists(dialogues(), min_size=1, max_size=4), st.sampled_from([None, 2]))
def test_of_every_container(rows, indent):
    values = [openai(dialogue) for dialogue in rows]
    lines = "\n".join(json.dumps(v, indent=indent, ensure_ascii=False) for v in values)
    for text in (json.dumps(values, indent=indent), lines):
        assert [value for _, value in read_json(io.BytesIO(text.encode()))[1]] == values
    file = io.StringIO()
    names = ["query", "response", "history", "images"]
    table = csv.DictWriter(file, names, delimiter=";", lineterminator="\r\n")
    table.writeheader()
    for dialogue in rows:
        fields = native(dialogue)
        cells = {"history": json.dumps(fields["history"]), "images": json.dumps(fields["images"])}
        table.writerow({name: (fields | cells)[name] for name in names})
    found = [value for _, value in read_table(io.BytesIO(file.getvalue().encode()))[1]]
    for value, dialogue in zip(found, rows, strict=True):
        assert same(read(value), as_trained(replace(dialogue, system=None), True))


def labels(processor: Any, conversation: Conversation) -> list[str]:
    """The trained spans of a sample, as text."""
    sample = encode(conversation, processor.chat)
    spans: list[list[int]] = [[]]
    for token in sample.labels.tolist():
        if token != IGNORE:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    return [processor.text(span, special=False).strip() for span in spans if span]


@in_dialogues
@pytest.mark.parametrize(
    ("losses", "loss_on", "trained"),
    [
        ((True, True, True), "all", ["one", "two", "three"]),
        ((True, False, True), "all", ["one", "three"]),
        ((False, False, True), "all", ["three"]),
        ((True, True, False), "all", ["one", "two"]),
        ((True, True, True), "last", ["three"]),
        ((False, True, None), "last", ["three"]),
    ],
)
def test_what_is_not_to_be_trained_has_no_label(processor, losses, loss_on, trained):
    turns: list[dict[str, Any]] = []
    for loss, reply in zip(losses, ("one", "two", "three"), strict=True):
        turns.append({"role": "user", "content": "Which?"})
        turns.append({"role": "assistant", "content": reply, "loss": loss})
    reading = Reading(processor.family.image_tag, loss_on=loss_on)
    record = Record({"messages": turns}, Path("a.jsonl"), 1)
    conversation = read_record(record, reading, Path()).conversations[0]
    assert labels(processor, conversation) == trained


def test_a_loss_that_is_neither_is_refused():
    for loss, said in ((0.5, "0.5"), ("false", "'false'"), (2, "2")):
        turns = [
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "this", "loss_weight": loss},
        ]
        with pytest.raises(Exception, match=f'turn 2: "loss_weight" is {said}'):
            read({"messages": turns})
    turns[1] |= {"loss_weight": False}
    with pytest.raises(Exception, match="no reply is trained"):
        read({"messages": turns})
