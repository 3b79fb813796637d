"""Image files -> RGB images as the authors' code reads them, and the facts about each file."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from PIL import Image, UnidentifiedImageError

from vlft.console import tracked
from vlft.data.conversation import ImageFacts
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import BufferedReader
    from pathlib import Path

T = TypeVar("T")
# Most pixels of the images that are checked at the same time, four bytes each; a larger image is
# checked alone.
PIXELS_IN_FLIGHT = 2**27
# Pillow allocates images in blocks. glibc returns freed blocks of 64 MiB to the system, but keeps
# Pillow's default blocks of 16 MiB for the thread, as many as its largest image needed.
if "PILLOW_BLOCK_SIZE" not in os.environ:
    Image.core.set_block_size(2**26)  # type: ignore[attr-defined]


class _Budget:
    """Bounds the sum of what threads hold at the same time."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._freed = threading.Condition()

    @contextmanager
    def share(self, size: int) -> Iterator[None]:
        """Waits until ``size`` is free and holds it; a size above the total waits for all of it."""
        size = min(size, self._total)
        with self._freed:
            self._freed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._freed:
                self._free += size
                self._freed.notify_all()


_budget = _Budget(PIXELS_IN_FLIGHT)


def decode(path: Path, *, digest: str | None = None) -> Image.Image:
    """The image in RGB: alpha dropped, first frame, EXIF orientation ignored.

    Raises:
        DataError: the file is missing, is not a whole image, or has another SHA-256 than given.
    """

    def read(file: BufferedReader) -> Image.Image:
        if digest is not None and _digest(file) != digest:
            raise DataError(
                "the image has changed since the data was checked",
                place=shown(path),
                hint="start again, and do not write to the images until training has begun",
            )
        return _decode(file)

    return _read(path, read, "")


def inspect_image(path: Path, *, place: str = "") -> ImageFacts:
    """The facts about an image file, which is opened once and decoded whole.

    Raises:
        DataError: the file is missing or is not a whole image; ``place`` is that of its record.
    """
    return _read(path, lambda file: ImageFacts(_digest(file), _whole_size(file)), place)


def inspect_images(paths: Iterable[Path]) -> dict[Path, ImageFacts | DataError]:
    """The facts about every file, or its error; each is opened once, several in parallel.

    The pixels in memory are bounded, see PIXELS_IN_FLIGHT.
    """

    def attempt(path: Path) -> ImageFacts | DataError:
        try:
            return inspect_image(path)
        except DataError as error:
            return error

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        found = tracked(pool.map(attempt, unique), "checking images", len(unique))
        return dict(zip(unique, found, strict=True))


def _read(path: Path, use: Callable[[BufferedReader], T], place: str) -> T:
    where = f"{place}: {shown(path)}" if place else shown(path)
    try:
        with path.open("rb") as file:
            return use(file)
    except (FileNotFoundError, NotADirectoryError):
        found, hint = "no such image", "paths start at the data file's folder, or at --image-root"
    except UnidentifiedImageError:
        found = "not an image of a known format"
        hint = "name an image, or drop such records with --on-bad-sample skip"
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None)
        found = f"cannot be read ({reason})" if reason else f"not a whole image ({error})"
        hint = "replace the file, or drop such records with --on-bad-sample skip"
    raise DataError(found, place=where, hint=hint)


def _digest(file: BufferedReader) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def _decode(file: BufferedReader) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        return image.convert("RGB")


def _whole_size(file: BufferedReader) -> tuple[int, int]:
    """(width, height) of an image that can be decoded whole and converted to RGB."""
    with Image.open(file, formats=_formats()) as image, _budget.share(image.width * image.height):
        image.load()
        # One pixel tells whether the mode can be converted, without a second copy of the image.
        image.crop((0, 0, 1, 1)).convert("RGB")
        size = image.size
        # The pixels are freed before others take their place.
        image.close()
        return size


@functools.cache
def _formats() -> tuple[str, ...]:
    """All formats that Pillow opens, except EPS: Pillow hands it to Ghostscript."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))
