"""Records -> conversations: fields are checked, and images are put where their tags are."""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
from typing import TYPE_CHECKING, Any

from vlft.data.conversation import Conversation, ImageRef, Part, Turn
from vlft.data.download import ADDRESS, image_ref
from vlft.data.records import kind_of
from vlft.errors import LONE_SURROGATE, DataError
from vlft.settings import unknown_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FIELDS = ("query", "response", "history", "images", "system")
# Further fields of the lines that vlft infer writes; older versions wrote generation.
RESULT_FIELDS = ("label", "finish", "image_keys", "file", "line", "generation")
IGNORED = ("id", "meta")
COMMON_TAG = "<image>"
# Fields that hold several texts: what is allowed and an example, for messages.
LISTS = {
    "images": ("a list of paths", '["a.jpg"]'),
    "history": ('a list of ["question", "reply"] pairs', '[["question", "reply"]]'),
}
URL = re.compile(r"([a-z][a-z0-9+.-]+:)+//|(file|data|https?):", re.IGNORECASE)


def native(
    fields: Mapping[str, Any], *, place: str, folder: Path, image_tag: str, need_response: bool
) -> Conversation:
    """The conversation of a record in the native layout.

    Args:
        fields: ``query`` and, as needed, ``response``, ``history``, ``images``, ``system``.
            ``id``, ``meta`` and names with a leading underscore are ignored; null counts as absent.
            A line of a result file is taken too: for training its response is the reply, for
            inference its label.
        place: of the record, for messages.
        folder: where relative image paths start.
        image_tag: the family's own tag, which means the same as ``<image>``.
        need_response: whether a missing reply is an error (training) or a question (inference).

    Raises:
        DataError: with the place and what is allowed.
    """
    fields = _without_result(fields, need_response=need_response)
    try:
        _check_fields(fields, need_response=need_response)
        response, system = fields.get("response"), fields.get("system")
        if not need_response and response is not None and not response.strip():
            response = None
        texts = [*(_texts("history", fields.get("history")) or ()), fields["query"]]
        names = _texts("images", fields.get("images")) or ()
        refs = [image_ref(name, folder) for name in names]
        parts = place_images(texts, refs, image_tag)
        _check_texts(parts[-1], response, system, image_tag)
    except DataError as error:
        raise DataError(error.message, place=place, hint=error.hint) from None
    if response is not None:
        parts.append((response,))
    turns = tuple(
        Turn("assistant" if index % 2 else "user", part) for index, part in enumerate(parts)
    )
    return Conversation(turns, system, place)


def result_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A result line with lists that were written as JSON text turned into lists again."""
    found = dict(fields)
    for name in ("images", "image_keys", "history"):
        if isinstance(found.get(name), str) and found[name].startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                found[name] = json.loads(found[name])
    return found


def _without_result(fields: Mapping[str, Any], *, need_response: bool) -> Mapping[str, Any]:
    """The record's fields without those that vlft infer adds; other records are unchanged."""
    if "image_keys" not in fields and not {"label", "generation"} <= fields.keys():
        return fields
    found = {k: v for k, v in result_lists(fields).items() if k not in RESULT_FIELDS}
    return found if need_response else {**found, "response": fields.get("label")}


def _check_fields(fields: Mapping[str, Any], *, need_response: bool) -> None:
    """Raises DataError unless all fields are known and of the right type, and none is missing."""
    for name in fields:
        if name not in FIELDS and name not in IGNORED and not name.startswith("_"):
            error = unknown_name(name, [*FIELDS], place="", what="field")
            raise DataError(error.message, hint=f"{error.hint}; id, meta and _names are ignored")
    if fields.get("query") is None:
        raise DataError('no "query"', hint='write e.g. {"query": "...", ...}')
    for name, value in fields.items():
        if name in FIELDS and value is not None:
            _check_value(name, value)
    if need_response and fields.get("response") is None:
        raise DataError('no "response"', hint="training needs the reply that is to be learnt")


def _check_value(name: str, value: object) -> None:
    texts = _texts(name, value)
    if texts is None or not all(isinstance(text, str) for text in texts):
        found = reprlib.repr(value)
        found = found if len(found) <= 50 else found[:47] + "..."
        allowed, example = LISTS.get(name, ("text", '"..."'))
        raise DataError(
            f'"{name}": found {kind_of(value)}, {found}; {allowed} is allowed',
            hint=f'write e.g. "{name}": {example}',
        )
    for text in texts:
        _check_text(name, text)


def _check_text(name: str, text: str) -> None:
    lone = LONE_SURROGATE.search(text)
    if lone:
        raise DataError(
            f'"{name}" holds {lone[0]!a}, a lone surrogate',
            hint="write the file again as UTF-8, or remove the character",
        )
    if name == "images":
        _check_path(text)


def _check_path(path: str) -> None:
    if not path.strip():
        raise DataError('"images" holds an empty path', hint="name an image")
    if "\0" in path:
        raise DataError(
            f'"images" holds {path!r}; no path has a NUL character', hint="remove the character"
        )
    if URL.match(path) and not ADDRESS.match(path):
        raise DataError(
            f"found {path[:100]!r} as an image; paths and http(s) addresses are allowed",
            hint="download the images and name their paths",
        )


def place_images(
    texts: list[str], images: list[ImageRef], image_tag: str
) -> list[tuple[Part, ...]]:
    """The parts of each text, every image where its tag is or, without tags, where its turn starts.

    The texts are of user and assistant in turn; the first and the last are the user's.
    """
    tag = re.compile(f"({re.escape(COMMON_TAG)}|{re.escape(image_tag)})")
    tags = sum(len(tag.findall(text)) for text in texts)
    if tags == 0 and images:
        texts = _tag_turns(texts, len(images))
    elif tags != len(images):
        listed = "1 image" if len(images) == 1 else f"{len(images)} images"
        raise DataError(
            f"{listed} listed, {tags} {COMMON_TAG} in the text",
            hint=f'put one {COMMON_TAG} per entry of "images", in the order they are read',
        )
    left = iter(images)
    return [
        tuple(next(left) if tag.fullmatch(piece) else piece for piece in tag.split(text) if piece)
        for text in texts
    ]


def _tag_turns(texts: list[str], images: int) -> list[str]:
    """The texts with tags at the start of the turns that the images belong to."""
    user_turns = len(texts[::2])
    if user_turns == 1 or images == 1:
        per_turn = [images] + [0] * (user_turns - 1)
    elif images == user_turns:
        per_turn = [1] * user_turns
    else:
        raise DataError(
            f"{images} images listed, {user_turns} user turns and no {COMMON_TAG} in the text",
            hint=f"put {COMMON_TAG} where each image belongs",
        )
    tagged = list(texts)
    for turn, count in enumerate(per_turn):
        tagged[2 * turn] = COMMON_TAG * count + texts[2 * turn]
    return tagged


def _check_texts(
    query: tuple[Part, ...], response: str | None, system: str | None, image_tag: str
) -> None:
    if not any(isinstance(part, ImageRef) or part.strip() for part in query):
        raise DataError('"query" is empty', hint="write the question")
    if response is not None and not response.strip():
        raise DataError(
            '"response" is empty', hint="write the reply; only vlft infer works without"
        )
    for name, text in (("response", response), ("system", system)):
        for tag in (COMMON_TAG, image_tag):
            if text and tag in text:
                raise DataError(
                    f'found {tag} in "{name}"', hint="images belong in the query or the history"
                )


def _texts(name: str, value: object) -> list[Any] | None:
    """The texts of a field in one list, None if its form is wrong; a single path needs no list."""
    if name == "images" and isinstance(value, str):
        return [value] if value else []
    if name not in LISTS:
        return [value]
    if not isinstance(value, list | tuple):
        return None
    if name == "images":
        return list(value)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return None
    return [text for pair in value for text in pair]
