"""What the fields of a file may hold: rules by the name of a field, applied at any depth of it.

    {"language_config": {"hidden_size": -1}}  ->  language_config.hidden_size: found -1, a whole
                                                  number from 1 to 131072 is allowed

A field without a rule is not read, so that it may hold anything. Null counts as absent.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlft.errors import LONE_SURROGATE, CheckpointError, raise_all
from vlft.patterns import are_quick

_NAME = re.compile(r"[\w.-]{1,400}")
AGAIN = "write or download it again"


@dataclass(frozen=True)
class Rule:
    """What a field may hold, in words, and whether it does."""

    words: str
    allows: Callable[[Any], bool]


Schema = Mapping[str, Rule]


def check_fields(fields: Mapping[str, Any], schema: Schema, place: str) -> None:
    """Raises a CheckpointError for each field, at any depth, that breaks its rule.

    Args:
        fields: of a JSON file.
        schema: by the name of a field.
        place: the file, for messages.
    """
    raise_all(
        [
            CheckpointError(
                f"{path}: found {reprlib.repr(value)}, {rule.words} is allowed",
                place=place,
                hint=AGAIN,
            )
            for path, value, rule in _broken(fields, schema, "")
        ]
    )


def _broken(
    fields: Mapping[str, Any], schema: Schema, path: str
) -> Iterator[tuple[str, Any, Rule]]:
    for name, value in fields.items():
        rule = schema.get(name)
        if rule is not None and value is not None and not rule.allows(value):
            yield f"{path}{name}", value, rule
        elif isinstance(value, dict):
            yield from _broken(value, schema, f"{path}{name}.")


def whole(least: int, most: int) -> Rule:
    """A whole number between two, both included."""

    def allows(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return Rule(f"a whole number from {least} to {most}", allows)


def number(least: float, most: float) -> Rule:
    """A number between two, both included."""

    def allows(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value) and least <= value <= most

    return Rule(f"a number from {least:g} to {most:g}", allows)


def many(rule: Rule, least: int = 0, most: int = 100_000) -> Rule:
    """A list of values that the rule allows."""

    def allows(value: Any) -> bool:
        return isinstance(value, list) and least <= len(value) <= most and all_allowed(value, rule)

    count = f"{least}" if least == most else f"{least} to {most}"
    return Rule(f"a list of {count} values, each {rule.words},", allows)


def by_pattern(rule: Rule) -> Rule:
    """An object with values that the rule allows, by the ends of names or patterns of them."""

    def allows(value: Any) -> bool:
        return table(rule).allows(value) and are_quick(rf"(.*\.)?({key})$" for key in value)

    few = "by at most 500 names or expressions with few ways of matching one"
    return Rule(f"an object {few}, each value {rule.words},", allows)


def table(rule: Rule) -> Rule:
    """An object whose values the rule allows."""

    def allows(value: Any) -> bool:
        return isinstance(value, dict) and all_allowed(value.values(), rule)

    return Rule(f"an object with values that are each {rule.words}", allows)


def either(*rules: Rule) -> Rule:
    """What one of the rules allows."""
    return Rule(
        " or ".join(rule.words for rule in rules),
        lambda value: any(rule.allows(value) for rule in rules),
    )


def all_allowed(values: Any, rule: Rule) -> bool:
    """Whether the rule allows every value."""
    return all(map(rule.allows, values))


BOOL = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("text", lambda value: isinstance(value, str) and len(value) <= 100_000)
UTF8_TEXT = Rule(
    "text of UTF-8", lambda value: TEXT.allows(value) and not LONE_SURROGATE.search(value)
)
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
TEXTS = many(TEXT)
# peft matches some of them as expressions, in which their dots are the only operators.
NAME = Rule("the name of a module", lambda v: TEXT.allows(v) and bool(_NAME.fullmatch(v)))
NAMES = many(NAME, most=20_000)


PATTERN = Rule(
    "a regular expression with few ways of matching a name",
    lambda value: TEXT.allows(value) and are_quick([value]),
)
PATTERNS = Rule(
    "a list of at most 500 such expressions, together with few ways of matching a name",
    lambda value: TEXTS.allows(value) and are_quick(value),
)
NOTHING = Rule("nothing", lambda value: value is None)
ANY: Schema = {}
