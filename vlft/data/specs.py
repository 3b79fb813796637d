"""What a user writes after ``--dataset``: files, folders, patterns, and how much of each."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.console import working
from vlft.data.containers import FORMATS, open_records, reopen_records
from vlft.data.hub_sets import hub_folder, is_hub_set
from vlft.data.in_memory import keep_records
from vlft.data.receipt import read_receipt, receipt_path
from vlft.data.source import read_file, restored_file
from vlft.errors import DataError, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from vlft.data.encoder import Encoder
    from vlft.data.items import Inspected
    from vlft.data.options import DataOptions
    from vlft.data.source import ReadFile
    from vlft.data.split import Draws

# Longer endings first: .jsonl.gz is not .jsonl with something behind it.
_ENDINGS = "|".join(map(re.escape, sorted(FORMATS, key=len, reverse=True)))
SAMPLED = re.compile(f"(.+(?:{_ENDINGS}))(#)(.*)", re.IGNORECASE | re.DOTALL)


def expand(files: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """The files of all sources in order; see ``expand_each``."""
    return [name for group in expand_each(files) for name in group]


def expand_each(files: Sequence[str | Mapping[str, Any]]) -> list[list[str]]:
    """For each source its files: those that match in the place of a pattern like ``data/*.jsonl``.

    A data set of a hub is downloaded, and becomes a folder. Records that are given in the place of
    files become a file, the last source.

    Raises:
        DataError: a pattern matches no file, or a hub does not give a data set.
    """
    made: list[list[str]] = []
    rows = [item for item in files if not isinstance(item, str)]
    for spec in (item for item in files if isinstance(item, str)):
        if is_hub_set(spec):
            made.append([hub_folder(spec)])
            continue
        path, count = parse_spec(spec)
        if path.exists() or not glob.has_magic(str(path)):
            made.append([spec])
            continue
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute patterns)
        if not found:
            raise DataError("matches no file", place=shown(path), hint="check the pattern")
        made.append([name if count is None else f"{name}#{count}" for name in found])
    return [*made, [keep_records(rows)]] if rows else made


def read_files(
    specs: Sequence[str],
    draws: Draws,
    options: DataOptions,
    inspected: Inspected,
    encoder: Encoder | None = None,
) -> list[ReadFile | UsageError]:
    """The files in order, or the error of one that cannot be read at all; see ``read_file``."""
    made: list[ReadFile | UsageError] = []
    for number, spec in enumerate(specs):
        chosen = None
        if options.only_validation and options.history.validation is not None:
            chosen = {record for file, record in options.history.validation if file == number}
        try:
            made.append(open_file(spec, draws, options, inspected, encoder, chosen))
        except UsageError as error:
            made.append(error)
    return made


def open_file(
    spec: str,
    draws: Draws,
    options: DataOptions,
    inspected: Inspected,
    encoder: Encoder | None = None,
    chosen: Collection[int] | None = None,
) -> ReadFile:
    """A data file, or the part of it that is drawn and, if it is given, chosen.

    Raises:
        DataError: it cannot be read at all.
    """
    path, amount = parse_spec(spec)
    receipt = None
    if encoder is not None and amount is None:
        receipt = read_receipt(receipt_path(path, options, encoder))
    with working(f"opening {path.name}"):
        if receipt is not None and "offsets" in receipt.arrays:
            records = reopen_records(path, receipt.meta, receipt.arrays)
        else:
            records = open_records(path, options.reading.columns.values())
    if not len(records):
        raise DataError("no records", place=shown(path), hint="add some, or leave it out")
    indices = draws.take(path, len(records), amount, spec)
    if receipt is not None:
        return restored_file(records, receipt, options, inspected)
    if chosen is not None:
        indices = [index for index in indices if index in chosen]
    return read_file(records, indices, options, inspected, encoder)


def parse_spec(spec: str) -> tuple[Path, str | None]:
    """The file, and how many of its records to draw; a ``#`` may be part of the file's name."""
    parts = SAMPLED.fullmatch(spec)
    name, mark, amount = parts.groups() if parts else spec.rpartition("#")
    is_one = parts or (mark and (Path(name).is_dir() or glob.has_magic(name)))
    if not is_one or Path(spec).exists():
        return Path(spec), None
    return Path(name), _amount(amount, spec)


def _amount(text: str, spec: str) -> str:
    """A number of records, or a share of them like ``20%``.

    Raises:
        DataError: it is neither.
    """
    share = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", text)
    if (share and 0 < float(share[1]) <= 100) or re.fullmatch(r"0*[1-9][0-9]{0,9}", text):
        return text
    raise DataError(
        f"found #{text} after the name",
        place=shown(spec),
        hint="write FILE#N for N of its records, FILE#20% for a share, or FILE for all",
    )
