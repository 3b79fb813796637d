"""Annotations of other tools -> records. What a file holds decides how it is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.data.containers import open_records
from vlft.data.convert.alto import convert_alto
from vlft.data.convert.coco import Coco, convert_coco, is_coco, read_coco
from vlft.data.convert.omnidocbench import convert_pages, is_page
from vlft.data.convert.page import convert_page
from vlft.data.convert.refs import (
    convert_expressions,
    convert_references,
    is_expression,
    is_reference,
)
from vlft.data.convert.samples import Found, Options
from vlft.data.convert.xml_tree import read_xml
from vlft.data.records import Record, RecordError
from vlft.errors import DataError, UsageError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

READ = "COCO and RefCOCO JSON, PAGE XML, ALTO XML and OmniDocBench JSON are converted"
# A file with one of these is one record, and not a list of them under its only key.
KEYS = ("images", "annotations", "layout_dets", "ann_id", "bbox")


def convert_files(paths: Sequence[Path], options: Options) -> Found:
    """The records of all files; problems are collected."""
    found = Found()
    references: list[Record] = []
    instances: list[Coco] = []
    for path in paths:
        try:
            if path.suffix.lower() == ".xml":
                _convert_xml(path, options, found)
            else:
                _convert_json(path, options, found, references, instances)
        except UsageError as error:
            found.problems.append(error)
    if references:
        convert_references(references, instances, options, found)
    else:
        for coco in instances:
            convert_coco(coco, options, found)
    return found


def _convert_xml(path: Path, options: Options, found: Found) -> None:
    root = read_xml(path)
    if root.name == "PcGts":
        convert_page(root, path, options, found)
    elif root.name == "alto":
        convert_alto(root, path, options, found)
    else:
        where = f"{shown(path)}:{root.line}"
        raise DataError(f"found <{root.name:.60}>, no PAGE or ALTO", place=where, hint=READ)


def _convert_json(
    path: Path, options: Options, found: Found, references: list[Record], instances: list[Coco]
) -> None:
    """Adds a file's records; those that refer to another file wait for it."""
    records: list[Record] = []
    for record in open_records(path, KEYS):
        if isinstance(record, RecordError):
            found.problems.append(record)
        else:
            records.append(record)
    first: Any = records[0].fields if records else None
    if is_coco(first):
        instances += [read_coco(r.fields, path) for r in records if is_coco(r.fields)]
    elif is_page(first):
        convert_pages(records, options, found)
    elif is_reference(first):
        references += [record for record in records if is_reference(record.fields)]
    elif is_expression(first):
        convert_expressions(records, options, found)
    elif records:
        names = ", ".join(list(first)[:12]) if isinstance(first, dict) else "a list"
        hint = f"{READ}; other layouts are read as they are, see vlft check"
        raise DataError(f"found records with {names}", place=records[0].place, hint=hint)
