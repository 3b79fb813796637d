"""Data files -> records: containers, told apart by what the file holds."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vlft.data.containers.columnar import read_parquet, read_saved
from vlft.data.containers.indexed import Indexed
from vlft.data.containers.json_text import BrokenTextError, read_json, record_at
from vlft.data.containers.table import read_table
from vlft.data.containers.text import is_blank, open_text
from vlft.data.containers.window import NotTextError
from vlft.data.records import EXAMPLE, Records
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path
    from typing import BinaryIO

ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
FORMATS = (*ENDINGS, *(f"{ending}.gz" for ending in ENDINGS))
NAME_A_FILE = "name a .json, .jsonl, .csv, .tsv or .parquet file, or one of these with .gz"
_UNPACK = "unpack it, and name the file that it holds"
# What to do with files that other tools write.
INSTEAD = {
    ".xlsx": "save it as CSV UTF-8", ".xls": "save it as CSV UTF-8", ".ods": "save it as CSV UTF-8",
    ".zst": _UNPACK, ".bz2": _UNPACK, ".xz": _UNPACK, ".zip": _UNPACK, ".gz": _UNPACK,
    ".tar": f"{_UNPACK}; samples in files of their own become lines of a .jsonl file",
    ".arrow": "name the folder that holds it together with state.json",
    ".ndjson": "call it .jsonl", ".xml": "vlft data converts PAGE and ALTO XML to .jsonl",
}  # fmt: skip


def open_records(path: Path, named: Collection[str] = ()) -> Records:
    """The records of a data file or folder; a bad record is its error, and the others are read.

    Args:
        path: of it.
        named: columns that the user has named.

    Raises:
        DataError: the file cannot be read at all.
    """
    if path.is_dir():
        return _open_folder(path)
    ending = _ending(path)
    if ending == ".parquet":
        return Records(path, "parquet", read_parquet([path]))
    with ExitStack() as opened:
        file = opened.enter_context(open_text(path))
        records = _read_text(file, path, ending, named)
        # From here on the index owns the file: closing the records closes it.
        weakref.finalize(records, opened.pop_all().close)
    return records


def reopen_records(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> Records:
    """The records of a JSON file whose bytes are known already, see receipt.py.

    Raises:
        DataError: the file cannot be read.
    """
    file = open_text(path)
    found = Indexed(file, record_at)
    found.offsets.frombytes(arrays["offsets"].astype("q").tobytes())
    found.lines.frombytes(arrays["lines"].astype("i").tobytes())
    records = Records(path, meta["kind"], found, meta["note"])
    weakref.finalize(records, file.close)
    return records


def _read_text(file: BinaryIO, path: Path, ending: str, named: Collection[str]) -> Records:
    """The records of a file of text.

    Raises:
        DataError: it cannot be read at all.
    """
    try:
        if is_blank(file):
            raise DataError("the file is empty", place=shown(path), hint=EXAMPLE)
        found = read_table(file) if ending in (".csv", ".tsv") else read_json(file, named)
        return Records(path, *found)
    except NotTextError as error:
        raise DataError(error.message, place=shown(path), hint=error.hint) from None
    except BrokenTextError as error:
        place = f"{shown(path)}:{error.line}"
        raise DataError(error.message, place=place, hint=error.hint) from None


def _ending(path: Path) -> str:
    """The ending that says how to read a file, without .gz.

    Raises:
        DataError: another one.
    """
    name = path.name.lower()
    ending = next((e for e in ENDINGS if name.endswith((e, f"{e}.gz"))), "")
    if ending:
        return ending
    found = f"found {path.suffix!r} at the end of the name"
    hint = INSTEAD.get(path.suffix.lower(), NAME_A_FILE)
    raise DataError(
        found if path.suffix else "the name has no ending", place=shown(path), hint=hint
    )


def _open_folder(path: Path) -> Records:
    """The records of a folder of save_to_disk, or of a folder of parquet files.

    Raises:
        DataError: it is neither.
    """
    names = sorted(item.name for item in path.iterdir() if not item.name.startswith("."))
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        return Records(path, "a folder of save_to_disk", read_saved(path))
    if names and all(name.endswith(".parquet") for name in names):
        parts = read_parquet([path / name for name in names])
        return Records(path, f"a folder of {len(names)} parquet files", parts)
    held = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise DataError(
        f"found a folder, which holds {held or 'nothing'}",
        place=shown(path),
        hint="name a data file, a folder of parquet files alone, or one that save_to_disk wrote",
    )
