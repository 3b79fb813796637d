"""A sample as a data file has it, and where it was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLE = 'write e.g. {"query": "...", "response": "..."}'
BOM = "\ufeff"

# A record as its file holds it, or the error that reading it gave.
Value = dict[str, Any] | list[Any] | DataError
# (line number, value that starts on this line)
Found = tuple[int, Value]


@dataclass(frozen=True)
class Record:
    """One sample as read.

    Attributes:
        fields: values by name, not checked yet; a list of messages may stand for them.
        path: the data file, or the folder of its parts.
        line: 1-based line in it where the record starts.
        number: 1-based number among the records of the file.
        is_alone: whether no record before it starts on the same line.
        shown: the path for messages, if it is known already.
    """

    fields: Any
    path: Path
    line: int
    number: int = 0
    is_alone: bool = True
    shown: str = ""

    @property
    def place(self) -> str:
        """For messages: ``train.jsonl:17``."""
        number = "" if self.is_alone else f" (record {self.number})"
        return f"{self.shown or shown(self.path)}:{self.line}{number}"

    @property
    def source(self) -> str:
        """File and number of the record."""
        return f"{self.path}:{self.number}"


class RecordError(DataError):
    """The problem of one record.

    Attributes:
        record: whose problem it is; without fields if they could not be read.
    """

    def __init__(self, error: DataError, record: Record, about: str = "") -> None:
        place = f"{record.place}: {about}" if about else record.place
        super().__init__(error.message, place=place, hint=error.hint)
        self.record = record
        self.cause = error


class Records(Sequence["Record | RecordError"]):
    """The records of one data file, in order.

    Args:
        path: of the file.
        kind: of its container, in words.
        found: its records, or their problems.
        note: what the user should know of how the file was read.
    """

    def __init__(self, path: Path, kind: str, found: Sequence[Found], note: str = "") -> None:
        self.path, self.kind, self.note = path, kind, note
        self.found, self._shown = found, shown(path)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: Any) -> Any:
        """A record, or its problem."""
        line, value = self.found[index]
        is_alone = index == 0 or self.found[index - 1][0] != line
        where = (self.path, line, index + 1, is_alone, self._shown)
        if isinstance(value, DataError):
            return RecordError(value, Record(None, *where))
        return Record(value, *where)


def kind_of(value: object) -> str:
    """The type of a JSON value, in words."""
    kinds = {
        bool: "true or false", str: "text", list: "a list", tuple: "a list", dict: "an object",
        bytes: "bytes",
    }  # fmt: skip
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
