"""Image files -> RGB images as the authors' code reads them, and the facts about each file."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from PIL import Image, UnidentifiedImageError

from vlft.console import tracked
from vlft.data.conversation import ImageFacts
from vlft.data.decoders import FAULTS, heard
from vlft.data.image_kinds import HEAD, REPLACE, what_it_is
from vlft.data.image_notes import SWAPPED_FROM, TURNS, Note, notes_of, orientation
from vlft.data.known_facts import KnownFacts
from vlft.data.looks import look_of
from vlft.errors import DataError, shown
from vlft.files import cache_folder, open_regular, real_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import BufferedReader
    from pathlib import Path

T = TypeVar("T")
# Most pixels of the images that are decoded at the same time, four bytes each; a larger image is
# decoded alone.
PIXELS_IN_FLIGHT = 2**27
# Twice what Pillow warns of: it opens no larger image, and neither does the authors' code.
MOST_PIXELS = 178_956_970
# Of a longer side a resize would need more memory for its weights than for the image.
LONGEST_SIDE = 1_000_000
LARGEST_FILE = 2**31
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


@contextmanager
def decoded(
    path: Path, *, digest: str | None = None, rotate: bool = False
) -> Iterator[Image.Image]:
    """The image in RGB: alpha dropped, first frame; EXIF orientation ignored unless ``rotate``.

    What other threads decode within their blocks waits if this image leaves too little memory.

    Raises:
        DataError: the file is missing, is not a whole image, or has another SHA-256 than given.
    """
    with ExitStack() as held:

        def read(file: BufferedReader, _lines: list[str]) -> Image.Image:
            if digest is not None:
                _check_digest(file, digest)
            with Image.open(file, formats=_formats()) as image:
                # The image as it is stored, and its copy in RGB.
                held.enter_context(_budget.share(2 * image.width * image.height))
                image.load()
                turning = TURNS.get(orientation(image)) if rotate else None
                # convert() copies an image that is RGB already.
                rgb = image if image.mode == "RGB" else image.convert("RGB")
                return rgb if turning is None else rgb.transpose(turning)

        yield _read(path, read, "")


def check_unchanged(path: Path, digest: str) -> None:
    """Raises DataError if a file is missing or has another SHA-256 than given."""
    _read(path, lambda file, _lines: _check_digest(file, digest), "")


def inspect_image(
    path: Path,
    *,
    place: str = "",
    rotate: bool = False,
    looks: bool = False,
    most_pixels: int = MOST_PIXELS,
) -> ImageFacts:
    """The facts about an image file, which is opened once and decoded whole.

    Args:
        path: the file.
        place: of its record, for messages.
        rotate: whether the image is going to be turned by its EXIF orientation.
        looks: whether the facts hold what it looks like.
        most_pixels: an image of more is refused before it is decoded.

    Raises:
        DataError: the file is missing, is not a whole image, or is too large.
    """
    return _read(path, lambda file, lines: _facts(file, lines, rotate, looks, most_pixels), place)


def inspect_images(
    paths: Iterable[Path],
    *,
    rotate: bool = False,
    inside: Path | None = None,
    looks: bool = False,
) -> dict[Path, ImageFacts | DataError]:
    """The facts about every file, or its error; each is opened once, several in parallel.

    A file outside of ``inside`` is refused, unless it was downloaded. The pixels in memory are
    bounded, see PIXELS_IN_FLIGHT. ``looks`` adds what they look like to the facts; without it,
    files that an earlier run checked and that have not changed since are not opened.
    """
    unique = list(dict.fromkeys(paths))
    kept = KnownFacts(unique, rotate=rotate)
    known = {} if looks else kept.find()

    def attempt(path: Path) -> ImageFacts | DataError:
        try:
            if inside is not None:
                _check_inside(path, inside)
            return known.get(path) or inspect_image(path, rotate=rotate, looks=looks)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        found = tracked(pool.map(attempt, unique), "checking images", len(unique))
        made = dict(zip(unique, found, strict=True))
    new = {path: facts for path, facts in made.items() if path not in known}
    kept.add({path: facts for path, facts in new.items() if isinstance(facts, ImageFacts)})
    return made


def _read(path: Path, use: Callable[[BufferedReader, list[str]], T], place: str) -> T:
    """What ``use`` makes of the open file, given what its decoder says meanwhile."""
    where = f"{place}: {shown(path)}" if place else shown(path)
    try:
        with heard() as lines, open_regular(path) as file:
            try:
                return use(file, lines)
            except UnidentifiedImageError:
                file.seek(0)
                found, hint = what_it_is(file.read(HEAD), os.fstat(file.fileno()).st_size)
            except Image.DecompressionBombError:
                found, hint = _stated_size(file), "make the image smaller"
    except DataError as error:
        raise DataError(error.message, place=where, hint=error.hint) from None
    except (FileNotFoundError, NotADirectoryError):
        found, hint = "no such image", "paths start at the data file's folder, or at --image-root"
    except FAULTS as error:
        reason = getattr(error, "strerror", None)
        found = f"cannot be read ({reason})" if reason else f"not a whole image ({_said(error)})"
        hint = REPLACE
    raise DataError(found, place=where, hint=hint)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _check_digest(file: BufferedReader, digest: str) -> None:
    if _digest(file) != digest:
        raise DataError(
            "the image has changed since the data was checked",
            hint="put the old file back and go on with --resume, or start again",
        )


def _digest(file: BufferedReader) -> str:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    return digest


def _facts(
    file: BufferedReader, lines: list[str], rotate: bool, looks: bool, most_pixels: int
) -> ImageFacts:
    """The facts about an image that can be decoded whole and converted to RGB."""
    _check_bytes(os.fstat(file.fileno()).st_size)
    digest = _digest(file)
    with Image.open(file, formats=_formats()) as image:
        _check_sides(image.size, most_pixels)
        with _budget.share(image.width * image.height):
            image.load()
            # One pixel tells whether the mode can be converted, without a copy of the image.
            image.crop((0, 0, 1, 1)).convert("RGB")
            is_swapped = rotate and orientation(image) >= SWAPPED_FROM
            size = (image.height, image.width) if is_swapped else image.size
            notes = notes_of(image, rotate=rotate)
            look = look_of(image) if looks else b""
            # The pixels are freed before others take their place.
            image.close()
    if lines:
        notes.append(Note("damaged", lines[0]))
    return ImageFacts(digest, size, tuple(notes), look)


def _check_inside(path: Path, folder: Path) -> None:
    """Raises DataError if a file is in another folder, also if a link leads there."""
    allowed = (folder, cache_folder("images"))
    if not any(real_path(path).is_relative_to(real_path(root)) for root in allowed):
        raise DataError(
            f"lies outside of {shown(folder)}",
            place=shown(path),
            hint="copy it there, or name another folder with --confine-images",
        )


def _check_bytes(size: int) -> None:
    if size > LARGEST_FILE:
        gib = f"{size / 2**30:,.0f} GiB, at most {LARGEST_FILE // 2**30} GiB are read"
        raise DataError(gib, hint="make the image smaller")


def _check_sides(size: tuple[int, int], most_pixels: int) -> None:
    if size[0] * size[1] > most_pixels:
        found = f"{size[0]:,} x {size[1]:,} pixels, at most {most_pixels:,} are read"
        raise DataError(found, hint="make the image smaller")
    if max(size) > LONGEST_SIDE:
        raise DataError(
            f"{size[0]:,} x {size[1]:,} pixels, at most {LONGEST_SIDE:,} on a side are read",
            hint="cut the image into parts",
        )


def _stated_size(file: BufferedReader) -> str:
    """What is said of an image that Pillow does not open because it has too many pixels."""
    for name in _formats():
        make, accepts = Image.OPEN[name]
        file.seek(0)
        head = file.read(16)
        file.seek(0)
        with suppress(*FAULTS):
            if accepts is None or accepts(head) is True:
                width, height = make(file, "").size
                return f"{width:,} x {height:,} pixels, at most {MOST_PIXELS:,} are read"
    return f"more than {MOST_PIXELS:,} pixels, which is the most that is read"


@functools.cache
def _formats() -> tuple[str, ...]:
    """All formats that Pillow opens, except EPS: Pillow hands it to Ghostscript."""
    Image.init()
    # The extra vlft[heif] lets Pillow open HEIC.
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(sorted(Image.OPEN.keys() - {"EPS"}))
