"""Hints for images that are not where a data file says: another spelling, another folder."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.data.conversation import ImageFacts, ImageRef
    from vlft.data.items import Inspected

MISSING = "no such image"
DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def near_image(image: ImageRef) -> str:
    """What may be wrong with the path of a missing image, as a hint; "" if nothing is seen."""
    given, folder = image.given, Path(str(image.path).removesuffix(image.given))
    if DRIVE.match(given):
        return "a path of Windows: write where the file is on this machine"
    if given.startswith("~"):
        return "~ is not the home folder in a data file: write the whole path"
    if "\\" in given:
        return f"backslashes: write {given.replace(chr(92), '/')}"
    if "%" in given and is_file(folder / unquote(given)):
        return f"there is {unquote(given)}: write it without percent escapes"
    return _near_name(image.path)


def _near_name(path: Path) -> str:
    """A file of the folder whose name differs in case or in its Unicode form alone."""
    try:
        names = sorted(item.name for item in path.parent.iterdir())
    except OSError:
        return ""
    wanted = unicodedata.normalize("NFC", path.name)
    for name in names:
        other = unicodedata.normalize("NFC", name)
        if other == wanted:
            return f"the same name in another Unicode form is there: {name!a}"
        if other.casefold() == wanted.casefold():
            return f"there is {shown(path.with_name(name))}"
    return ""


def root_of(images: Sequence[ImageRef], data: Path) -> str:
    """The working folder, or a parent of the data file, in which all images are; "" if none is."""
    given = {image.given for image in images if not Path(image.given).is_absolute()}
    here = Path.cwd()
    for root in (here, *data.absolute().parents):
        if given and all(is_file(root / name) for name in given):
            return os.path.relpath(root) if root.is_relative_to(here) else str(root)
    return ""


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for a name that is too long."""
    # Path.is_file raises OSError for that.
    return os.path.isfile(path)  # noqa: PTH113


def root_hint(
    images: Sequence[ImageRef], inspected: Inspected, path: Path, image_root: Path | None
) -> str:
    """Where all images of a file are, if some are not where they should be."""
    local = [image for image in images if image.address is None]
    if image_root is not None or not any(_is_missing(inspected[ref.path]) for ref in local):
        return ""
    root = root_of(local, path)
    return f"from {root} all are found: add --image-root {root}" if root else ""


def _is_missing(facts: ImageFacts | DataError) -> bool:
    return isinstance(facts, DataError) and facts.message == MISSING
