"""Fields of JSON, as in receipts and forms that are read into objects."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL | re.IGNORECASE)


def json_fields(reply: str, reference: str) -> float:
    """F1 of the fields in common, 0 to 1; a reply that is no JSON has none.

    A field is a path of names with a value, compared as text without white space around it; the
    order in a list does not count; null and empty text are no fields. As Donut's
    ``JSONParseEvaluator.cal_f1`` (Kim et al. 2022), but for each record, and 0 and false are
    fields. A reply may stand in a fence of ```json.

    Raises:
        ValueError: the reference is no JSON.
    """
    try:
        wanted = Counter(_fields(_parsed(reference)))
    except (ValueError, RecursionError):
        raise ValueError("is no JSON, which json-fields compares") from None
    try:
        found = Counter(_fields(_parsed(reply)))
    except (ValueError, RecursionError):
        return 0.0
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def _parsed(text: str) -> Any:
    fenced = FENCED.fullmatch(text.strip())
    return json.loads(fenced[1] if fenced else text)


def _fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _fields(item, (*path, name))
    elif isinstance(value, list):
        for item in value:
            yield from _fields(item, path)
    elif value is not None:
        is_whole = isinstance(value, float) and value.is_integer()
        text = value if isinstance(value, str) else json.dumps(int(value) if is_whole else value)
        if text.strip():
            yield path, text.strip()
