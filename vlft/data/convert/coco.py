"""COCO JSON -> a record for each category on an image, each expression, or each caption.

{"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id", "bbox"}], ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vlft.data.boxes import is_number
from vlft.data.convert.samples import DESCRIBE, Found, Options, image_of, located, make_row
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

DECIMALS = 3


def is_coco(fields: Any) -> bool:
    """Whether a JSON object has the keys of a COCO file."""
    return isinstance(fields, Mapping) and {"images", "annotations"} <= fields.keys()


@dataclass(frozen=True)
class Coco:
    """A COCO file.

    Attributes:
        images, annotations: by their ids; the latter only those with one.
        listed: all annotations, in order.
        categories: names by id.
    """

    path: Path
    images: Mapping[Any, Mapping[str, Any]]
    annotations: Mapping[Any, Mapping[str, Any]]
    listed: Sequence[Mapping[str, Any]]
    categories: Mapping[Any, str]

    def image(self, number: Any, options: Options, place: str) -> str:
        """The path of an image by its id.

        Raises:
            DataError: there is none.
        """
        name = self.images[self.known(number)].get("file_name")
        return image_of(name, self.path, options, place)

    def known(self, number: Any) -> Any:
        """The id of an image.

        Raises:
            DataError: there is none.
        """
        if not is_id(number) or number not in self.images:
            raise DataError(f"image_id {number!r:.40} is no image of the file")
        return number


def read_coco(fields: Mapping[str, Any], path: Path) -> Coco:
    """Parses a COCO file.

    Raises:
        DataError: an item is no object, or has no id.
    """
    images = _by_id(fields, "images", path)
    named = _by_id(fields, "categories", path) if fields.get("categories") else {}
    listed = _items(fields, "annotations", path)
    annotations = {item["id"]: item for item in listed if is_id(item.get("id"))}
    categories = {number: str(item.get("name", "")) for number, item in named.items()}
    return Coco(path, images, annotations, listed, categories)


def _items(fields: Mapping[str, Any], name: str, path: Path) -> list[Mapping[str, Any]]:
    items = fields[name]
    if not isinstance(items, list):
        raise DataError(f'"{name}" is no list', place=shown(path))
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError("found no object", place=f"{shown(path)}: {name}[{number}]")
    return items


def _by_id(fields: Mapping[str, Any], name: str, path: Path) -> dict[Any, Mapping[str, Any]]:
    items = _items(fields, name, path)
    for number, item in enumerate(items):
        if not is_id(item.get("id")):
            found = f"id is {item.get('id')!r:.40}, a number or a text is allowed"
            raise DataError(found, place=f"{shown(path)}: {name}[{number}]")
    return {item["id"]: item for item in items}


def is_id(value: Any) -> bool:
    """Whether a value can be the id of an item."""
    return isinstance(value, int | str)


# (id of an image, what is boxed) -> its boxes
Grouped = dict[tuple[Any, str], list[list[float]]]


def convert_coco(coco: Coco, options: Options, found: Found) -> None:
    """Adds the records of a file: of captions, of expressions (in its images), or of categories."""
    grouped: Grouped = {}
    for number, item in enumerate(coco.listed):
        place = f"{shown(coco.path)}: annotations[{number}]"
        attempt(partial(_read, item, coco, options, found, grouped, place), place, found)
    for (image, ref), boxes in grouped.items():
        place = f"{shown(coco.path)}: image {image}"
        attempt(partial(_locate, coco, image, ref, boxes, options, found, place), place, found)


def _read(
    item: Mapping[str, Any],
    coco: Coco,
    options: Options,
    found: Found,
    grouped: Grouped,
    place: str,
) -> None:
    """Adds a caption as a record, or a box to the boxes of its image and category."""
    if isinstance(item.get("caption"), str):
        image = coco.image(item.get("image_id"), options, place)
        name, question = str(item.get("id", place)), options.prompt or DESCRIBE
        found.rows.append(make_row(name, image, question, item["caption"].strip()))
    elif item.get("iscrowd"):
        found.left_out["annotations of crowds"] += 1
    else:
        box = corners(item.get("bbox"), "xywh")
        key = (coco.known(item.get("image_id")), _ref(item, coco))
        grouped.setdefault(key, []).append(box)


def _locate(
    coco: Coco,
    number: Any,
    ref: str,
    boxes: Sequence[Sequence[float]],
    options: Options,
    found: Found,
    place: str,
) -> None:
    """Adds the record of the boxes of one kind on an image."""
    image = coco.image(number, options, place)
    found.rows.append(located(f"{number}: {ref}", image, ref, boxes, options))


def attempt(work: Callable[[], None], place: str, found: Found) -> None:
    """Runs a function and collects its DataError as a problem of the file."""
    try:
        work()
    except DataError as error:
        place = error.place or place
        found.problems.append(DataError(error.message, place=place, hint=error.hint))


def _ref(item: Mapping[str, Any], coco: Coco) -> str:
    """The expression of the image of an annotation, else the name of its category.

    Raises:
        DataError: it has neither.
    """
    image = coco.images.get(item.get("image_id"), {})
    expression = image.get("caption")
    if isinstance(expression, str) and expression.strip():
        return expression.strip()
    category = item.get("category_id")
    name = coco.categories.get(category) if is_id(category) else None
    if not name:
        raise DataError(f"category_id {category!r:.40} is no category of the file")
    return name


def corners(box: Any, kind: str) -> list[float]:
    """x1, y1, x2, y2 of a box, in pixels.

    Args:
        box: four numbers.
        kind: xyxy, or xywh for x, y, width, height.

    Raises:
        DataError: they are no box.
    """
    values = list(box) if isinstance(box, list | tuple) else []
    if len(values) != 4 or not all(map(is_number, values)):
        raise DataError(f"bbox is {box!r:.60}, four numbers are allowed")
    x, y, third, fourth = values
    ends = (x + third, y + fourth) if kind == "xywh" else (third, fourth)
    if ends[0] < x or ends[1] < y:
        hint = "correct the box" + ("" if kind == "xywh" else ", or add --box-format xywh")
        raise DataError(f"bbox {values} has a negative width or height", hint=hint)
    return [round(value, DECIMALS) for value in (x, y, *ends)]
