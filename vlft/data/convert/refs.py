"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg) -> a record for each expression.

[{"ann_id", "image_id", "sentences": [{"sent"}]}] with a COCO file, as the sets are published
{"image": "a.jpg", "expression": "the left cat", "bbox": [10, 20, 60, 80]} one after the other
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vlft.data.convert.coco import attempt, corners, is_id
from vlft.data.convert.samples import Found, Options, image_of, located
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.convert.coco import Coco
    from vlft.data.records import Record

IMAGES = ("image", "img_path", "image_path", "file_name")
EXPRESSIONS = ("expression", "sent", "caption", "phrase")


def is_reference(fields: Any) -> bool:
    """Whether a record refers to annotations of a COCO file."""
    return isinstance(fields, dict) and {"ann_id", "sentences"} <= fields.keys()


def is_expression(fields: Any) -> bool:
    """Whether a record is an expression with its box."""
    return isinstance(fields, dict) and "bbox" in fields and bool(_first(fields, EXPRESSIONS))


def convert_references(
    records: Sequence[Record], instances: Sequence[Coco], options: Options, found: Found
) -> None:
    """Adds a record for each sentence, with the box of its annotation."""
    for record in records:
        attempt(partial(_refer, record, instances, options, found), record.place, found)


def _refer(record: Record, instances: Sequence[Coco], options: Options, found: Found) -> None:
    number, sentences = record.fields["ann_id"], record.fields["sentences"]
    known = (coco for coco in instances if is_id(number) and number in coco.annotations)
    coco = next(known, None)
    if coco is None:
        raise DataError(
            f"ann_id {number!r:.40} is no annotation of the files",
            hint="name the COCO file of the set as well, e.g. instances.json",
        )
    if not isinstance(sentences, list):
        raise DataError("sentences is no list")
    item = coco.annotations[number]
    box = corners(item.get("bbox"), "xywh")
    image = coco.image(item.get("image_id"), options, record.place)
    for index, sentence in enumerate(sentences):
        text = _text(sentence.get("sent") if isinstance(sentence, dict) else sentence)
        found.rows.append(located(f"{number}: {index}", image, text, [box], options))


def convert_expressions(records: Sequence[Record], options: Options, found: Found) -> None:
    """Adds one record for each referring expression of the file.

    Raises:
        DataError: nothing says what the numbers of a box are.
    """
    if options.box_format is None:
        raise DataError(
            "what the four numbers of a bbox are is not said",
            place=records[0].place,
            hint="add --box-format xyxy (two corners) or xywh (x, y, width, height)",
        )
    found.flags.add("box_format")
    for record in records:
        attempt(partial(_express, record, options, found), record.place, found)


def _express(record: Record, options: Options, found: Found) -> None:
    fields = record.fields
    if not is_expression(fields):
        raise DataError(f"no bbox, or none of {', '.join(EXPRESSIONS)}")
    image = image_of(_first(fields, IMAGES), record.path, options, record.place)
    box = corners(fields["bbox"], str(options.box_format))
    ref = _text(_first(fields, EXPRESSIONS))
    found.rows.append(located(str(record.number), image, ref, [box], options))


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name)), None)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"found {value!r:.60}, an expression in words is allowed")
    return value.strip()
