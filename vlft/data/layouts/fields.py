"""The fields of a record: which are filled, which were read, and errors about their values."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from vlft.data.names import ROLES
from vlft.data.records import kind_of
from vlft.errors import LONE_SURROGATE, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Fields:
    """The fields of a record.

    Args:
        values: by name.
        columns: role -> column that has it, see ``--columns``.
        turns: the record, if it is a list.

    Attributes:
        given: roles whose column was named by the user and is there.
        read: names that a rule has read.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        columns: Mapping[str, str],
        turns: Sequence[Any] | None = None,
    ) -> None:
        self.turns = turns
        self.given = {role: name for role, name in columns.items() if name in values}
        self._aliases = {alias for role in self.given for alias in ROLES[role]}
        self.values = dict(values)
        self.read: set[str] = set()

    def named(self, role: str) -> tuple[str, ...]:
        """The names that may have a role: the column that the user named, or the usual ones."""
        return (self.given[role],) if role in self.given else ROLES[role]

    def is_free(self, name: str) -> bool:
        """Whether a usual name has its usual meaning."""
        return name not in self.given.values() and name not in self._aliases

    def filled(self, name: str) -> bool:
        """Whether a field is there and not empty."""
        value = self.values.get(name)
        return value is not None and value not in ("", [], {}, ())

    def take(self, name: str) -> Any:
        """The value of a field, None if it is absent; the field counts as read."""
        if name in self.values:
            self.read.add(name)
        return self.values.get(name)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of these names whose value is not null."""
        return next((name for name in names if self.values.get(name) is not None), None)

    def text(self, name: str) -> str:
        """The text of a field, which counts as read.

        Raises:
            DataError: it is no text.
        """
        return as_text(self.take(name), f'"{name}"', f'"{name}": "..."')


def as_text(value: Any, name: str, example: str = "") -> str:
    """The value if it is a text that can be tokenised.

    Raises:
        DataError: it is another value; ``name`` says which.
    """
    if not isinstance(value, str):
        raise wrong_type(value, name, "text", example)
    lone = LONE_SURROGATE.search(value)
    if lone:
        raise DataError(
            f"{name} holds {lone[0]!a}, a lone surrogate",
            hint="write the file again as UTF-8, or remove the character",
        )
    return value


def wrong_type(value: Any, name: str, allowed: str, example: str = "") -> DataError:
    """The error of a value of another type than is allowed."""
    found = reprlib.repr(value)
    found = found if len(found) <= 50 else found[:47] + "..."
    return DataError(
        f"{name}: found {kind_of(value)}, {found}; {allowed} is allowed",
        hint=f"write e.g. {example}" if example else "",
    )
