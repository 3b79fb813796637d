"""Result files -> replies with their references, and the pairs of two files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.data.result_fields import result_lists
from vlft.errors import DataError, raise_all, shown
from vlft.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Answer:
    """A line of a result file that can be scored.

    Attributes:
        line: its number, from 1.
        fields: of the line.
        reply: what the model wrote; may be empty, which is a wrong answer.
        references: the right texts, at least one.
    """

    line: int
    fields: Mapping[str, Any]
    reply: str
    references: tuple[str, ...]

    def identity(self) -> str:
        """What makes it the same record in another file: what is asked about which images.

        Names of files and folders are none of it: digests stand for images where they are known.
        """
        fields = result_lists(self.fields)
        images = fields.get("image_keys") or fields.get("images")
        asked = [fields.get(name) or None for name in ("id", "query", "history")]
        return json.dumps([*asked, images or None, self.references], sort_keys=True)


@dataclass(frozen=True)
class Answers:
    """The answers of a result file, and how many of its lines have no reference."""

    path: Path
    answers: Sequence[Answer]
    unlabelled: int


def read_answers(path: Path, column: str) -> Answers:
    """The answers in a result file.

    Args:
        path: of the file.
        column: that holds the references, with dots for a field of a field.

    Raises:
        DataError: no file, lines that are no results, or no line has a reference.
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        hint = "name a result file of vlft infer"
        raise DataError("not a regular file", place=shown(path), hint=hint)
    found, problems = [], []
    for number, line in _lines(path):
        try:
            fields = _fields(line)
            references = _references(fields, column)
        except DataError as error:
            place = f"{shown(path)}:{number}"
            problems.append(DataError(error.message, place=place, hint=error.hint))
            continue
        found.append(Answer(number, fields, fields["response"], references))
    raise_all(problems)
    answers = [answer for answer in found if answer.references]
    if not found:
        raise DataError("has no lines", place=shown(path), hint="vlft infer writes result files")
    if not answers:
        hint = "name the column that holds the right text with --references"
        raise DataError(f"no line has a text in {column!r}", place=shown(path), hint=hint)
    return Answers(path, answers, len(found) - len(answers))


def by_checkpoint(answers: Answers) -> list[Answers]:
    """The answers of each checkpoint of a file where several stand side by side; else all.

    Their path is that of the file with the checkpoint in its name, for what is written beside it.
    """
    found: dict[str, list[Answer]] = {}
    for answer in answers.answers:
        name = answer.fields.get("checkpoint")
        found.setdefault(name if isinstance(name, str) else "", []).append(answer)
    if len(found) < 2:
        return [answers]
    stem = answers.path.name.removesuffix(".jsonl")
    return [
        Answers(
            answers.path.with_name(f"{stem}.{re.sub('[^A-Za-z0-9._-]+', '-', name)}.jsonl"),
            some,
            answers.unlabelled // len(found),
        )
        for name, some in found.items()
    ]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_regular(path) as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _fields(line: bytes) -> dict[str, Any]:
    """The fields of a result line.

    Raises:
        DataError: it is no JSON object with a text in ``response``.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        hint = "a stopped vlft infer finishes the file when it is run again"
        raise DataError("no whole line of JSON", hint=hint) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("response"), str):
        hint = 'a result line is {"response": "...", "label": "...", ...}'
        raise DataError("no text in 'response'", hint=hint)
    return fields


def _references(fields: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """The texts in a column; none if it is absent, null or empty.

    Raises:
        DataError: it holds something else.
    """
    value: Any = fields
    for name in column.split("."):
        value = _decoded(value).get(name) if isinstance(_decoded(value), dict) else None
    if isinstance(value, str) and column != "label" and value.startswith("["):
        value = _decoded(value)
    values = value if isinstance(value, list) else [value]
    texts = [_text(item) for item in values if item is not None]
    if None in texts:
        hint = "a text, a number, an object or a list of them is allowed"
        raise DataError(f"found {json.dumps(value)[:80]} in {column!r}", hint=hint)
    return tuple(text for text in texts if text and text.strip())


def _decoded(value: Any) -> Any:
    """The value; of a text that holds JSON, as columns of no single type do, what it holds."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(value: Any) -> str | None:
    """The text of a reference, as JSON where it is an object; None if it cannot be one."""
    if isinstance(value, bool | list):
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pair(base: Answers, tuned: Answers) -> tuple[list[int], list[int]]:
    """The positions of the answers to the same records in both files, in the order of the first.

    Of records that are alike the first is paired with the first, the second with the second.

    Raises:
        DataError: they have no record in common.
    """
    places = {key: index for index, key in enumerate(_keys(tuned.answers))}
    pairs = [(index, places[key]) for index, key in enumerate(_keys(base.answers)) if key in places]
    if not pairs:
        raise DataError(
            f"has no record in common with {shown(base.path)}: id, query, history, images and the "
            "references of a record must be equal",
            place=shown(tuned.path),
            hint="compare answers to the same data",
        )
    return [one for one, _ in pairs], [other for _, other in pairs]


def _keys(answers: Sequence[Answer]) -> Iterator[tuple[str, int]]:
    """The identity of each answer, and how many before it have the same."""
    seen: dict[str, int] = {}
    for answer in answers:
        key = answer.identity()
        seen[key] = seen.get(key, -1) + 1
        yield key, seen[key]
