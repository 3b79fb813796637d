"""ALTO XML (library scans, kraken, eScriptorium) -> a record for each page.

alto / Description / sourceImageInformation / fileName; Layout / Page / ... / TextLine / String
"""

from __future__ import annotations

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
    from pathlib import Path

    from vlft.data.convert.xml_tree import Element


def convert_alto(root: Element, path: Path, options: Options, found: Found) -> None:
    """Adds the record of an ALTO file, whose lines are in the order of the file.

    Raises:
        DataError: it has not one page and one image, or a line has no place.
    """
    pages = [page for layout in root.own("Layout") for page in layout.own("Page")]
    names = list(root.all("fileName"))
    if len(pages) != 1 or not names:
        what = f"{len(pages)} pages and {len(names)} names of images"
        hint = "write a file for each page, with the name of its image in fileName"
        raise DataError(f"found {what}, one of each is allowed", place=shown(path), hint=hint)
    place = f"{shown(path)}:{names[0].line}"
    image = image_of(names[0].text.strip(), path, options, place)
    blocks = [
        Block(text, "", _corners(line, pages[0], path) if options.boxes else None)
        for line in pages[0].all("TextLine")
        if (text := _text(line))
    ]
    add_page(path.stem, image, blocks, (READ_TEXT, READ_LINES), options, found)


def _text(line: Element) -> str:
    """The words of a line with a space between them, and its hyphen, as they are printed."""
    words = [item.attributes.get("CONTENT", "") for item in line.own("String")]
    hyphen = "".join(item.attributes.get("CONTENT", "-") for item in line.own("HYP"))
    return " ".join(filter(None, words)) + hyphen


def _corners(line: Element, page: Element, path: Path) -> Corners:
    """The box of a line, as shares of the page: its numbers may be pixels or tenths of millimetres.

    Raises:
        DataError: a number is missing.
    """
    x, y, width, height = (
        _number(line, name, path) for name in ("HPOS", "VPOS", "WIDTH", "HEIGHT")
    )
    sides = [_number(page, name, path) for name in ("WIDTH", "HEIGHT")]
    if 0 in sides:
        raise DataError("Page has no size", place=f"{shown(path)}:{page.line}")
    return shares((x, y, x + width, y + height), sides[0], sides[1])


def _number(element: Element, name: str, path: Path) -> float:
    value = element.attributes.get(name, "")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 2**31:
        place = f"{shown(path)}:{element.line}"
        found = f"{element.name}: {name} is {value!r:.40}, a number is allowed"
        raise DataError(found, place=place, hint="convert the texts alone: leave out --boxes")
    return number
