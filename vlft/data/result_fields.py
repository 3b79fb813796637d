"""Lines that ``vlft infer`` writes, read as data again."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a result line has besides a record's fields; older versions wrote generation.
RESULT_FIELDS = (
    "label", "finish", "markdown", "blocks", "image_keys", "file", "line", "generation",
)  # fmt: skip


def result_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A result line with lists that were written as JSON text turned into lists again."""
    found = dict(fields)
    for name in ("images", "image_keys", "history"):
        if isinstance(found.get(name), str) and found[name].startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                found[name] = json.loads(found[name])
    return found


def without_result(fields: Mapping[str, Any], need_response: bool) -> Mapping[str, Any]:
    """The record of a result line; other records are unchanged.

    For training its response is the reply, for inference its label.
    """
    if "image_keys" not in fields and not {"label", "generation"} <= fields.keys():
        return fields
    found = {k: v for k, v in result_lists(fields).items() if k not in RESULT_FIELDS}
    return found if need_response else {**found, "response": fields.get("label")}
