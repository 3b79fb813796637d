"""Parquet files and folders of save_to_disk -> records, read in batches when they are needed."""

from __future__ import annotations

import json
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from vlft.data.containers.text import PARQUET, open_bytes
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vlft.data.records import Found

INSTALL = "pip install 'vlft[datasets]'"
BYTES_HELD = 2**27
# (number of rows, what reads them)
Batch = tuple[int, Callable[[], Any]]


class Rows(Sequence["Found"]):
    """The rows of batches of a table, with their numbers.

    The batches that were used last are held, up to BYTES_HELD: in a shuffled order the next row is
    of any batch, and a batch is decoded as a whole.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._ends = list(accumulate(count for count, _ in batches))
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        """The number of a row from 1, and its values by column."""
        number = bisect_right(self._ends, index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self._ends[number] - self._batches[number][0]
        return index + 1, self._batch(number).slice(index - start, 1).to_pylist()[0]

    def _batch(self, number: int) -> Any:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        # Room is made before a batch of about the same size is read.
        while self._held and self._bytes + self._bytes // len(self._held) > BYTES_HELD:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        self._held[number] = found = self._batches[number][1]()
        self._bytes += found.nbytes
        return found


def _arrow(place: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        found = "parquet and Arrow files need pyarrow, which is not installed"
        raise DataError(found, place=place, hint=INSTALL) from None
    return pyarrow


def read_parquet(paths: Sequence[Path]) -> Rows:
    """The rows of parquet files, in order.

    Raises:
        DataError: a file cannot be read.
    """
    batches: list[Batch] = []
    with ExitStack() as opened:
        for path in paths:
            arrow = _arrow(shown(path))
            try:
                source = opened.enter_context(open_bytes(path, PARQUET))
                file = arrow.parquet.ParquetFile(source)
            except (arrow.ArrowException, OSError) as error:
                raise _unreadable(path, error) from None
            batches += _groups(file, path)
        rows = Rows(batches)
        weakref.finalize(rows, opened.pop_all().close)
    return rows


def _groups(file: Any, path: Path) -> Iterator[Batch]:
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        yield count, partial(_read_group, file, group, path)


def _read_group(file: Any, group: int, path: Path) -> Any:
    arrow = _arrow(shown(path))
    try:
        return file.read_row_group(group)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def read_saved(folder: Path) -> Rows:
    """The rows of a folder that ``Dataset.save_to_disk`` wrote.

    Raises:
        DataError: a file of it cannot be read.
    """
    arrow = _arrow(shown(folder))
    state = folder / "state.json"
    try:
        names = [item["filename"] for item in json.loads(state.read_text("utf-8"))["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(state, error) from None
    batches: list[Batch] = []
    for name in names:
        path = folder / str(name)
        if path.parent != folder:
            found = f"found {name!r} as a file of the folder"
            raise DataError(found, place=shown(state), hint="write the folder again")
        try:
            table = arrow.ipc.open_stream(arrow.memory_map(str(path))).read_all()
        except (arrow.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
        batches.append((table.num_rows, partial(_same, table)))
    return Rows(batches)


def _same(table: Any) -> Any:
    return table


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).split("\n")[0]
    hint = "download or write it again"
    return DataError(f"cannot be read ({reason})", place=shown(path), hint=hint)
