"""Records of a file of text, kept as the bytes where they start and read when they are needed."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlft.errors import DataError

if TYPE_CHECKING:
    from typing import BinaryIO

    from vlft.data.records import Found, Value

# ((offset, line number) of a record, error of reading it)
Indexing = tuple[tuple[int, int], DataError | None]


class Indexed(Sequence["Found"]):
    """The records of a file, eight bytes for each, and four more if lines are not numbers.

    Args:
        file: open for as long as records are read.
        read: the bytes of a record, with what follows it -> its value.

    Attributes:
        offsets: first byte of each record.
        lines: line of each, from 1; empty if every record is on the line of its number.
        problems: by index, of records that cannot be read.
    """

    def __init__(self, file: BinaryIO, read: Callable[[bytes], Value]) -> None:
        self.offsets, self.lines = array("q"), array("i")
        self.problems: dict[int, DataError] = {}
        self._file, self._read = file, read
        here = file.tell()
        self._size = file.seek(0, os.SEEK_END)
        file.seek(here)

    def add(self, place: tuple[int, int], problem: DataError | None) -> None:
        """Adds a record to the index: the offset of its first byte, and its line number."""
        offset, line = place
        if problem is not None:
            self.problems[len(self.offsets)] = problem
        self.offsets.append(offset)
        if self.lines or line != len(self.offsets):
            if not self.lines:
                self.lines.extend(range(1, len(self.offsets)))
            self.lines.append(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        """The line number of a record, and its value or the error of reading it."""
        line = self.lines[index] if self.lines else index + 1
        if index in self.problems:
            return line, self.problems[index]
        start = self.offsets[index]
        end = self.offsets[index + 1] if index + 1 < len(self) else self._size
        self._file.seek(start)
        return line, self._read(self._file.read(end - start))
