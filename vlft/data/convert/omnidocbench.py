"""OmniDocBench.json -> a record for each page: its markdown, or each part of it below its box.

[{"layout_dets": [{"category_type", "poly", "order", "ignore", "text"}], "page_info": {...}}]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.data.boxes import is_number
from vlft.data.convert.samples import (
    READ_LAYOUT,
    READ_TEXT,
    Block,
    Corners,
    Found,
    Options,
    add_page,
    image_of,
    shares,
)
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.data.records import Record

# Names of layout parts -> the names that DeepSeek-OCR writes; other names stay.
REFS = {
    "text_block": "text",
    "figure": "image",
    "figure_caption": "image_caption",
    "equation_isolated": "equation",
}


def is_page(fields: Any) -> bool:
    """Whether a record is a page of OmniDocBench."""
    return isinstance(fields, dict) and "layout_dets" in fields


def convert_pages(records: list[Record], options: Options, found: Found) -> None:
    """Adds a record for each page."""
    for record in records:
        try:
            _add(record, options, found)
        except DataError as error:
            place = error.place or record.place
            found.problems.append(DataError(error.message, place=place, hint=error.hint))


def _add(record: Record, options: Options, found: Found) -> None:
    if not is_page(record.fields):
        raise DataError("the record has no layout_dets")
    page, parts = record.fields.get("page_info"), record.fields["layout_dets"]
    if not isinstance(page, dict) or not isinstance(parts, list):
        raise DataError("page_info is no object, or layout_dets no list")
    if not all(isinstance(part, dict) for part in parts):
        raise DataError("layout_dets holds something that is no object")
    kept = [part for part in parts if isinstance(part.get("order"), int) and not part.get("ignore")]
    found.left_out["parts of pages without order, or to be ignored"] += len(parts) - len(kept)
    kept.sort(key=lambda part: part["order"])
    blocks = [
        Block(_ref(part), text, _corners(part, page) if options.boxes else None)
        for part in kept
        if (text := _text(part)) or options.boxes
    ]
    name = page.get("image_path")
    image = image_of(name, _source(record), options, record.place)
    add_page(str(name), image, blocks, (READ_TEXT, READ_LAYOUT), options, found)


def _source(record: Record) -> Any:
    """The file, or where its images are as the set is published: in images/ beside it."""
    images = record.path.parent / "images"
    return images / record.path.name if images.is_dir() else record.path


def _ref(part: Mapping[str, Any]) -> str:
    name = part.get("category_type")
    if not isinstance(name, str) or not name:
        raise DataError(f"category_type is {name!r:.60}, a name is allowed")
    return REFS.get(name, name)


def _text(part: Mapping[str, Any]) -> str:
    """The text of a part: of a table its HTML, of a formula its LaTeX."""
    texts = (part.get(name) for name in ("html", "text", "latex"))
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")


def _corners(part: Mapping[str, Any], page: Mapping[str, Any]) -> Corners:
    poly = part.get("poly")
    numbers = poly if isinstance(poly, list) else []
    if len(numbers) != 8 or not all(map(is_number, numbers)):
        raise DataError(f"poly is {poly!r:.60}, four corners of two numbers are allowed")
    width, height = page.get("width"), page.get("height")
    if not (is_number(width) and is_number(height) and width > 0 and height > 0):
        found = f"the page has {width!r:.40} x {height!r:.40} pixels, numbers are allowed"
        raise DataError(found, hint="boxes need the size of the page's image")
    xs, ys = numbers[::2], numbers[1::2]
    return shares((min(xs), min(ys), max(xs), max(ys)), width, height)
