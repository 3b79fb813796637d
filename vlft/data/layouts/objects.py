"""``objects`` of a record -> boxes, and what they show.

{"objects": {"ref": ["cat"], "bbox": [[10, 20, 60, 80]], "bbox_type": "real", "image_id": [0]}}
{"objects": [{"ref": "cat", "bbox": [10, 20, 60, 80]}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.data.boxes import KINDS, is_number
from vlft.data.layouts.ask import LayoutError
from vlft.data.layouts.fields import as_text, wrong_type
from vlft.errors import DataError

if TYPE_CHECKING:
    from vlft.data.layouts.fields import Fields
    from vlft.data.options import Reading

NAME = "objects"
EXAMPLE = '"objects": {"ref": ["cat"], "bbox": [[10, 20, 60, 80]]}'
# Names that an entry may use -> the name of today.
NAMES = {"ref": "ref", "caption": "ref", "bbox": "bbox", "bbox_type": "bbox_type",
         "image_id": "image_id", "image": "image_id"}  # fmt: skip
# Tags that the text of a ref may not contain: they would be read as tags.
MARKS = re.compile(r"<\|/?(?:ref|det|grounding)\|>|<bbox>|<ref-object>|<image>|<image_placeholder>")


@dataclass(frozen=True)
class Place:
    """A box before its image is known.

    Attributes:
        image: its index among the images of the record.
    """

    corners: tuple[float, float, float, float]
    kind: str
    image: int
    name: str


@dataclass(frozen=True)
class Objects:
    """What a record shows in its images.

    Attributes:
        refs: for the tags ``<ref-object>``, in order.
        places: for the tags ``<bbox>``, in order; mostly one for each.
    """

    refs: tuple[str, ...]
    places: tuple[tuple[Place, ...], ...]


def objects_of(fields: Fields, reading: Reading) -> Objects | None:
    """The objects of a record; None without.

    Raises:
        DataError: the field cannot be read, or the family has no tags for boxes.
    """
    given = fields.values.get(NAME)
    if not fields.filled(NAME) or (isinstance(given, Mapping) and not any(given.values())):
        return None
    if not reading.has_boxes and reading.objects != "drop":
        raise LayoutError(
            f'found "{NAME}"; this family has no tags for boxes',
            fields,
            "tune DeepSeek-VL2 or DeepSeek-OCR, which have some (vlft check --model MODEL checks "
            "the data for them), or add --objects drop to train the texts alone",
        )
    value = fields.take(NAME)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        return _of_columns(_known(value, f'"{NAME}"'))
    if isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value):
        return _of_entries(value)
    raise wrong_type(value, f'"{NAME}"', "an object, or a list of objects", EXAMPLE)


def _known(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The filled items by their names of today.

    Raises:
        DataError: another name is filled.
    """
    filled = {key: item for key, item in value.items() if item is not None}
    unknown = [key for key in filled if key not in NAMES]
    if unknown:
        raise DataError(
            f"{name} has {unknown[0]!r}; ref, bbox, bbox_type and image_id are read",
            hint="leave it out; vlft data converts COCO and others, whose boxes are x, y, width, "
            "height",
        )
    return {NAMES[key]: item for key, item in filled.items()}


def _of_columns(value: Mapping[str, Any]) -> Objects:
    refs = _list(value.get("ref", []), f'"{NAME}": ref')
    boxes = _list(value.get("bbox", []), f'"{NAME}": bbox')
    if boxes and not isinstance(boxes[0], list | tuple):
        boxes = [boxes]
    ids = value.get("image_id", [])
    ids = list(ids) if isinstance(ids, list | tuple) else [ids] * len(boxes)
    # A box without image_id is on the first image, as ms-swift documents.
    ids += [0] * (len(boxes) - len(ids))
    kind = value.get("bbox_type")
    names = [f'"{NAME}": box {number}' for number in range(1, len(boxes) + 1)]
    places = zip(boxes, ids, names, strict=False)
    return Objects(_refs(refs), tuple(_places(box, kind, image, n) for box, image, n in places))


def _of_entries(entries: Sequence[Mapping[str, Any]]) -> Objects:
    refs, places = [], []
    for number, entry in enumerate(entries, start=1):
        name = f'"{NAME}": box {number}'
        found = _known(entry, name)
        if "ref" in found:
            refs.append(found["ref"])
        if "bbox" in found:
            image = found.get("image_id", 0)
            places.append(_places(found["bbox"], found.get("bbox_type"), image, name))
    return Objects(_refs(refs), tuple(places))


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise wrong_type(value, name, "a list", EXAMPLE)
    return list(value)


def _refs(values: Sequence[Any]) -> tuple[str, ...]:
    texts = [as_text(text, f'"{NAME}": ref {n}', EXAMPLE) for n, text in enumerate(values, 1)]
    for number, text in enumerate(texts, start=1):
        mark = MARKS.search(text)
        if mark or not text.strip():
            found = f'"{NAME}": ref {number} ' + (f"holds {mark[0]}" if mark else "is empty")
            raise DataError(found, hint="say in words what the box shows")
    return tuple(texts)


def _places(value: Any, kind: Any, image: Any, name: str) -> tuple[Place, ...]:
    """The boxes of one tag: four numbers, or a list of such boxes.

    Raises:
        DataError: it is something else.
    """
    boxes = value if isinstance(value, list | tuple) else ()
    if not boxes or not all(isinstance(box, list | tuple) for box in boxes):
        boxes = [value]
    if isinstance(image, bool) or not isinstance(image, int) or image < 0:
        raise wrong_type(
            image, f"{name}: image_id", "the number of an image, from 0", '"image_id": [0]'
        )
    return tuple(Place(_corners(box, name), _kind(kind, box, name), image, name) for box in boxes)


def _corners(box: Any, name: str) -> tuple[float, float, float, float]:
    is_list = isinstance(box, list | tuple)
    if not is_list or not all(map(is_number, box)):
        raise wrong_type(box, name, "a list of four numbers", EXAMPLE)
    if len(box) != 4:
        what = "a point, for which these models have no tags" if len(box) == 2 else ""
        found = f"{name} has {len(box)} numbers" + (f", {what}" if what else "")
        raise DataError(found, hint="x1, y1, x2, y2 are allowed")
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y2)


def _kind(kind: Any, box: Sequence[float], name: str) -> str:
    """What the numbers of a box are.

    Raises:
        DataError: an unknown kind, or none is stated and the numbers look like shares.
    """
    known = {**{name: name for name in KINDS}, "norm_1": "norm1", "norm_1000": "norm1000"}
    if kind is not None and known.get(kind if isinstance(kind, str) else "") is None:
        found = f"{name}: bbox_type is {kind!r:.60}"
        raise DataError(found, hint=f"allowed: {', '.join(KINDS)}")
    if kind is None and max(box) <= 1 and any(value != int(value) for value in box):
        raise DataError(
            f"{name} {list(box)}: no number is above 1, and bbox_type is not stated",
            hint='add "bbox_type": "norm1" for shares of the sides, or "real" for pixels',
        )
    return "real" if kind is None else known[kind]
