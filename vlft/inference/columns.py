"""Records -> rows that other programs can load as a table.

pyarrow, polars and ``datasets`` take the type of a column from its first lines and fail, or drop
values without a word, if later ones have another. Thus a column has one type from the first line
on: a text is empty where a record has none, and what has no single type is written as JSON text.
"""

from __future__ import annotations

import functools
import json
import math
import os
from typing import TYPE_CHECKING, Any

from vlft.data.conversation import flat_text
from vlft.data.layouts.place import COMMON_TAG

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.conversation import Conversation, ImageRef

# polars infers the types from this many lines, the other libraries from more.
FIRST_LINES = 100
# These columns are always written, others only if a record has a value.
ALWAYS = ("query", "label", "images", "image_keys")
# How the values of a column are written: unchanged, as text ("" for none), or as JSON text.
AS_IS, TEXT, JSON_TEXT = "as it is", "text", "JSON text"


class Columns:
    """The columns of a result file, chosen from all the records that it answers.

    Args:
        conversations: all of them.
        system_prompt: the default, which stands in for a record's own.
    """

    def __init__(self, conversations: Sequence[Conversation], system_prompt: str) -> None:
        self._system_prompt = system_prompt
        first: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for number, item in enumerate(conversations):
            if number == FIRST_LINES:
                first = dict(found)
            for name, value in _values(item).items():
                found[name] = _merged(found.get(name), _type(value))
        if len(conversations) <= FIRST_LINES:
            first = found
        kinds = {name: _column_kind(found[name], first[name]) for name in found}
        self.kinds = {n: kind or AS_IS for n, kind in kinds.items() if kind or n in ALWAYS}

    def row(self, conversation: Conversation) -> dict[str, Any]:
        """The columns of a record, as a result line holds them."""
        values = _values(conversation)
        if values["system"] is None and self.kinds.get("system") == TEXT:
            values["system"] = self._system_prompt
        return {name: _written(values[name], kind) for name, kind in self.kinds.items()}


def _values(conversation: Conversation) -> dict[str, Any]:
    """The values of a record by column, None or an empty list where there is none."""
    prompt = conversation.without_reply()
    texts = [flat_text(turn, COMMON_TAG) for turn in prompt.turns]
    origin = conversation.origin
    return {
        "query": texts[-1],
        "label": conversation.reply,
        "images": [_name(image) for image in prompt.images],
        "image_keys": [image.facts.digest[:16] for image in prompt.images if image.facts],
        "history": [[texts[i], texts[i + 1]] for i in range(0, len(texts) - 1, 2)],
        "system": conversation.system,
        "id": origin.id if origin else None,
        "meta": origin.meta if origin else None,
        "file": str(origin.path) if origin else None,
        "line": origin.line if origin else None,
    }


def _name(image: ImageRef) -> str:
    """The address or the absolute path of an image."""
    return image.address or os.path.abspath(image.path)  # noqa: PTH100


def _column_kind(found: Any, first: Any) -> str | None:
    """How a column of values of this type is written; None if no record has a value."""
    if found in (None, ["list", None]):
        return None
    if found == "text":
        return TEXT
    return AS_IS if found == first and not _is_mixed(found) else JSON_TEXT


def _type(value: Any) -> Any:
    """The type of a JSON value: a word, a list or an object of types, None for null."""
    if isinstance(value, dict):
        return {name: _type(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return ["list", functools.reduce(_merged, map(_type, value), None)]
    if isinstance(value, float) and not math.isfinite(value):
        return "mixed"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "mixed"
    names = {bool: "boolean", int: "integer", float: "number", str: "text"}
    return None if value is None else names.get(type(value), "mixed")


def _merged(one: Any, other: Any) -> Any:
    """The type of values of both types; mixed if no column can have it."""
    if one is None or other is None or one == other:
        return other if one is None else one
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: _merged(one.get(name), other.get(name)) for name in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return ["list", _merged(one[1], other[1])]
    return "number" if {str(one), str(other)} == {"integer", "number"} else "mixed"


def _is_mixed(found: Any) -> bool:
    if isinstance(found, dict):
        return any(map(_is_mixed, found.values()))
    return _is_mixed(found[1]) if isinstance(found, list) else found == "mixed"


def _written(value: Any, kind: str) -> Any:
    if kind == AS_IS:
        return value
    if kind == JSON_TEXT and not isinstance(value, str | None):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value or ""


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of the items that are not equal, in the order of the first."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]
