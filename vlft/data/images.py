"""Image files -> RGB images, as the authors' code reads them."""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image, UnidentifiedImageError

from vlft.console import tracked
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")


@functools.cache
def formats() -> tuple[str, ...]:
    """All that Pillow opens, less what it starts another program for (Ghostscript)."""
    Image.init()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))


def decode(path: Path, *, place: str = "") -> Image.Image:
    """The image in RGB: alpha dropped, first frame, EXIF orientation ignored.

    Raises:
        DataError: the file is missing or is not a whole image.
    """
    return _read(path, lambda image: image.convert("RGB"), place)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, EXIF orientation ignored; only the file's head is read.

    Raises:
        DataError: the file is missing or is not an image.
    """
    return _read(path, lambda image: image.size, "")


def _read(path: Path, use: Callable[[Image.Image], T], place: str) -> T:
    where = f"{place}: {shown(path)}" if place else shown(path)
    try:
        with Image.open(path, formats=formats()) as image:
            return use(image)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            "no such image",
            place=where,
            hint="paths start at the data file's folder, or at --image-root",
        ) from None
    except UnidentifiedImageError:
        raise DataError(
            "not an image of a known format",
            place=where,
            hint="name an image, or drop such records with --on-bad-sample skip",
        ) from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None)
        raise DataError(
            f"cannot be read ({reason})" if reason else f"not a whole image ({error})",
            place=where,
            hint="replace the file, or drop such records with --on-bad-sample skip",
        ) from None


def content_key(path: Path) -> str:
    """SHA-256 of the file's bytes: two references with one key are one image."""
    stat = path.stat()
    return _digest(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1_000_000)
def _digest(path: str, modified: int, size: int) -> str:  # noqa: ARG001 (part of the cache key)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_broken(paths: Iterable[Path]) -> dict[Path, DataError]:
    """Decodes every file once, in threads; returns the error of each that cannot be used."""

    def attempt(path: Path) -> DataError | None:
        try:
            decode(path)
        except DataError as error:
            return error
        return None

    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        tried = tracked(pool.map(attempt, unique), "checking images", len(unique))
        found = zip(unique, tried, strict=True)
        return {path: error for path, error in found if error is not None}
