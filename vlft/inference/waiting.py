"""Result lines that wait for those of earlier records, in memory and in a file.

.answers.jsonl.waiting   a line for each: [number of the record from 0, its result line]

The file is removed once all records are answered.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonlines

from vlft.files import json_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Row = dict[str, Any]


class Waiting:
    """The lines that wait.

    Args:
        path: the result file.

    Attributes:
        path: their own file.
        rows: by the number of the record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f".{path.name}.waiting")
        self.rows: dict[int, Row] = {}

    def read(self, first: int, end: int) -> None:
        """Takes the lines of records from ``first`` up to ``end`` from the file.

        A kill may have cut off the last one; it and those of other records leave the file.
        """
        for line in self.path.read_bytes().splitlines():
            try:
                number, row = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                break
            if isinstance(number, int) and first <= number < end and isinstance(row, dict):
                self.rows[number] = row
        lines = [json_text([number, row]) + "\n" for number, row in self.rows.items()]
        write_whole(self.path, "".join(lines))

    def keep(self, numbers: Iterable[int]) -> None:
        """Adds the lines of these records to the file, as far as they wait."""
        lines = [[number, self.rows[number]] for number in numbers if number in self.rows]
        if lines:
            with jsonlines.open(self.path, "a", dumps=json_text, flush=True) as file:
                file.write_all(lines)

    def take(self, number: int) -> list[Row]:
        """The lines of the records from this one on, up to the first that is not there."""
        taken = []
        while number in self.rows:
            taken.append(self.rows.pop(number))
            number += 1
        return taken

    def remove(self) -> None:
        """Removes the file."""
        self.rows.clear()
        self.path.unlink(missing_ok=True)
