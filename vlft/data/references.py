"""Values of image fields -> references to image files."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from vlft.data.conversation import ImageRef
from vlft.data.download import ADDRESS, image_ref
from vlft.data.embedded import LONGEST_TEXT, check_size, store
from vlft.data.layouts.fields import as_text, wrong_type
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ELSEWHERE = re.compile(r"(?:[a-z][a-z0-9+.-]+:)+//|https?:", re.IGNORECASE)
FILE = re.compile(r"file:", re.IGNORECASE)
DATA = re.compile(r"data:(?P<kind>[^,]*),(?P<body>.*)", re.IGNORECASE | re.DOTALL)
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
# A shorter text is a path.
SHORTEST_BASE64 = 100


def is_empty(value: Any) -> bool:
    """Whether a value of an image field is no image."""
    if isinstance(value, dict) and not value.keys() - {"bytes", "path"}:
        return all(not item for item in value.values())
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def has_bytes(value: Any) -> bool:
    """Whether an image field holds the bytes of its images."""
    items = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, dict) and item.get("bytes") for item in items)


def image_refs(value: Any, name: str, folder: Path) -> list[ImageRef]:
    """The images of a value: a path, an address, bytes, {bytes, path}, or a list of these.

    Args:
        value: of a field.
        name: of the field, for messages.
        folder: where relative paths start.

    Raises:
        DataError: it is something else.
    """
    if is_empty(value):
        return []
    items = value if isinstance(value, list | tuple) else [value]
    if not all(map(_is_image, items)):
        raise wrong_type(value, name, "a list of paths", f'{name}: ["a.jpg"]')
    return [_reference(item, name, folder) for item in items]


def images_by_tag(value: Any, name: str, folder: Path) -> Mapping[str, ImageRef]:
    """The images of an object whose keys are tags, e.g. ``{"<image_00>": "a.jpg"}``; else none."""
    if not isinstance(value, dict) or not value:
        return {}
    if not all(isinstance(key, str) and re.fullmatch("<[^<>]+>", key) for key in value):
        return {}
    made = {tag: image_refs(item, f"{name}: {tag}", folder) for tag, item in value.items()}
    wrong = next((tag for tag, refs in made.items() if len(refs) != 1), None)
    if wrong is not None:
        raise wrong_type(value[wrong], f"{name}: {wrong}", "a path")
    return {tag: refs[0] for tag, refs in made.items()}


def _is_image(item: Any) -> bool:
    """Whether a value can be an image: a text, bytes, {bytes, path}, or an image of Pillow."""
    if isinstance(item, dict):
        return not item.keys() - {"bytes", "path"} and not is_empty(item)
    return isinstance(item, str | bytes) or is_in_memory(item)


def is_in_memory(value: Any) -> bool:
    """Whether a value is an image of Pillow."""
    return hasattr(value, "save") and hasattr(value, "mode")


def png_of(image: Any) -> bytes:
    """The bytes of an image of Pillow, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _reference(item: Any, name: str, folder: Path) -> ImageRef:
    given = "embedded image"
    if isinstance(item, dict):
        path, data = item.get("path"), item.get("bytes")
        given, item = path or given, data or path
    if isinstance(item, str):
        return _from_text(item, name, folder)
    return _stored(png_of(item) if is_in_memory(item) else item, given, name)


def _stored(data: Any, given: str, name: str) -> ImageRef:
    if not isinstance(data, bytes):
        raise wrong_type(data, f"{name}: bytes", "bytes")
    return ImageRef(store(data), given)


def _from_text(text: str, name: str, folder: Path) -> ImageRef:
    as_text(text, name)
    if not text.strip():
        raise DataError(f"{name} holds an empty path", hint="name an image")
    if "\0" in text:
        found = f"{name} holds {text!r:.60}; no path has a NUL character"
        raise DataError(found, hint="remove the character")
    data = DATA.fullmatch(text)
    if data:
        return _stored(_decoded(data["kind"], data["body"], name), "data: URI", name)
    if FILE.match(text):
        path = unquote(urlsplit(text).path)
        return ImageRef(folder / path, path)
    if ELSEWHERE.match(text) and not ADDRESS.match(text):
        raise DataError(
            f"found {text[:200]!r} as an image; paths and http(s) addresses are allowed",
            hint="download the images and name their paths",
        )
    if len(text) > SHORTEST_BASE64 and BASE64.fullmatch(text):
        return _stored(_decoded(";base64", text, name), "base64 text", name)
    return image_ref(text, folder)


def _decoded(kind: str, body: str, name: str) -> bytes:
    """The bytes of a ``data:`` URI."""
    if len(body) > LONGEST_TEXT:
        check_size(len(body) * 3 // 4)
    try:
        if not kind.lower().endswith(";base64"):
            return unquote(body).encode("latin-1")
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        found = f"{name}: an embedded image is not base64 ({error})"
        raise DataError(found, hint="write the image again, or its path") from None
