"""PAGE XML (Transkribus, eScriptorium, OCR-D) -> a record for each page.

PcGts / Page / ReadingOrder, TextRegion / TextLine / Coords, TextEquiv / Unicode
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vlft.data.convert.samples import (
    READ_LINES,
    READ_TEXT,
    Block,
    Corners,
    Found,
    Options,
    add_page,
    image_of,
    shares,
)
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vlft.data.convert.xml_tree import Element

NUMBER = r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?"
POINT = re.compile(f"({NUMBER}),({NUMBER})")
GROUPS = (
    "OrderedGroup", "UnorderedGroup", "OrderedGroupIndexed", "UnorderedGroupIndexed",
    "RegionRefIndexed", "RegionRef",
)  # fmt: skip


def convert_page(root: Element, path: Path, options: Options, found: Found) -> None:
    """Adds the records of a PAGE file.

    Raises:
        DataError: there is no page, its image is not there, or a line has no place.
    """
    pages = list(root.own("Page"))
    if not pages:
        raise DataError("no Page in it", place=shown(path), hint="this is no PAGE XML file")
    for page in pages:
        place = f"{shown(path)}:{page.line}"
        image = image_of(page.attributes.get("imageFilename"), path, options, place)
        blocks = [block for line in _lines(page) if (block := _block(line, page, path, options))]
        add_page(path.stem, image, blocks, (READ_TEXT, READ_LINES), options, found)


def _lines(page: Element) -> Iterator[Element]:
    """The lines, or regions without lines, in reading order; what it does not name comes last."""
    regions = {region.attributes.get("id", ""): region for region in page.all("TextRegion")}
    order = [name for group in page.own("ReadingOrder") for name in _named(group)]
    named = [regions[name] for name in dict.fromkeys(order) if name in regions]
    chosen = {id(region) for region in named}
    for region in [*named, *(r for r in page.all("TextRegion") if id(r) not in chosen)]:
        lines = list(region.own("TextLine"))
        nested = any(region.own("TextRegion"))
        yield from lines or ([] if nested else [region])


def _named(group: Element) -> list[str]:
    """The regions of a group of the reading order: those with an index by it."""
    children = [child for child in group.children if child.name in GROUPS]
    if all(child.index("index") is not None for child in children):
        children.sort(key=lambda child: child.index("index") or 0)
    names: list[str] = []
    for child in children:
        names += [child.attributes["regionRef"]] if "regionRef" in child.attributes else []
        names += _named(child)
    return names


def _text(line: Element) -> str:
    """The text of a line or region: its first reading, else those of its words."""
    readings = list(line.own("TextEquiv"))
    readings.sort(key=lambda item: item.index("index") or 0)
    texts = ["".join(part.text for part in item.own("Unicode")) for item in readings[:1]]
    return texts[0].strip() if texts else " ".join(filter(None, map(_text, line.own("Word"))))


def _block(line: Element, page: Element, path: Path, options: Options) -> Block | None:
    """The block of a line; None if it has no text."""
    text = _text(line)
    if not text:
        return None
    return Block(text, "", _corners(line, page, path) if options.boxes else None)


def _corners(line: Element, page: Element, path: Path) -> Corners:
    """The bounding box of a line's outline, as shares of the page's width and height.

    Raises:
        DataError: there is none.
    """
    outline = next(line.own("Coords"), None)
    points: list[tuple[float, float]] = []
    if outline is not None:
        listed = POINT.findall(outline.attributes.get("points", ""))
        points = [(float(x), float(y)) for x, y in listed]
        # The schema before 2013 has one element for each point.
        points += [_point(point) for point in outline.own("Point")]
    if not points:
        place = f"{shown(path)}:{line.line}"
        hint = "convert the texts alone: leave out --boxes"
        raise DataError(f"{line.name} has no Coords", place=place, hint=hint)
    xs, ys = zip(*points, strict=True)
    width, height = (_size(page, name, path) for name in ("imageWidth", "imageHeight"))
    return shares((min(xs), min(ys), max(xs), max(ys)), width, height)


def _point(point: Element) -> tuple[float, float]:
    found = POINT.match(f"{point.attributes.get('x')},{point.attributes.get('y')}")
    return (float(found[1]), float(found[2])) if found else (0.0, 0.0)


def _size(page: Element, name: str, path: Path) -> float:
    value = page.index(name)
    if not value:
        place = f"{shown(path)}:{page.line}"
        found = f"{name} is {page.attributes.get(name)!r:.40}, a number of pixels is allowed"
        raise DataError(found, place=place, hint="boxes need the size of the page's image")
    return value
