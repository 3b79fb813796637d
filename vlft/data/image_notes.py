"""What a user would not expect of an image that is read as the authors' code reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from vlft.console import warn
from vlft.data.decoders import FAULTS
from vlft.errors import shown

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vlft.data.conversation import Conversation

Kind = Literal["turned", "transparent", "deep", "pages", "damaged"]

# What is said of the images of a kind, and what can be done.
KINDS: dict[Kind, tuple[str, str]] = {
    "turned": (
        "EXIF says how to turn them, which the authors' code does for DeepSeek-OCR alone",
        "--exif rotate turns them",
    ),
    "transparent": (
        "one colour once their transparency is dropped, as in the authors' code",
        "save them without transparency, on a background that shows what is drawn",
    ),
    "deep": (
        "more than 8 bits a pixel, of which values above 255 become white and below 1 black",
        "scale them to 8 bits",
    ),
    "pages": (
        "only the first page or frame is read",
        "save the other pages as images too, with an <image> for each",
    ),
    "damaged": ("perhaps damaged, as their decoder complains", "look at them, or replace them"),
}
# EXIF tag, and its values other than 1, the upright.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# From this value on, width and height are swapped.
SWAPPED_FROM = 5
# Colours that differ by less than this, of 255, look the same.
VISIBLE = 8
# Formats whose files can hold pages; other files with several frames are animations. In an MPO of a
# phone or the layers of a PSD there is only one image to be seen.
PAGED = ("TIFF", "DCX")
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "FLI")
MOST_PAGES_COUNTED = 1000


@dataclass(frozen=True)
class Note:
    """Something unexpected about an image.

    Attributes:
        kind: see KINDS.
        detail: what was found in this file.
    """

    kind: Kind
    detail: str


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image: 1, upright, or one of TURNS."""
    # Pillow itself turns TIFF, and then forgets the tag.
    try:
        value = image.getexif().get(ORIENTATION)
    except FAULTS:
        return 1
    return value if value in TURNS else 1


def notes_of(image: Image.Image, *, rotate: bool) -> list[Note]:
    """What is unexpected about a decoded image; ``rotate`` if it is going to be turned."""
    stored = orientation(image)
    turned = Note("turned", f"EXIF orientation {stored}") if stored > 1 and not rotate else None
    return [note for note in (turned, _colours(image), _pages(image)) if note is not None]


def list_notes(conversations: Iterable[Conversation]) -> list[dict[str, str]]:
    """One entry per image and note: the record that shows it first, the file, kind and detail."""
    found: dict[tuple[Path, Note], dict[str, str]] = {}
    for conversation in conversations:
        for ref in conversation.images:
            for note in ref.facts.notes if ref.facts else ():
                found.setdefault(
                    (ref.path, note),
                    {
                        "record": conversation.place,
                        "image": ref.given,
                        "kind": note.kind,
                        "detail": note.detail,
                    },
                )
    return list(found.values())


def warn_of_images(conversations: Iterable[Conversation]) -> None:
    """Says once per kind how many images have notes, and which is the first."""
    notes = list_notes(conversations)
    for kind, (what, remedy) in KINDS.items():
        places = [
            f"{note['record']}: {shown(note['image'])}: {note['detail']}"
            for note in notes
            if note["kind"] == kind
        ]
        if places:
            images = "1 image" if len(places) == 1 else f"{len(places)} images"
            first = places[0] if len(places) == 1 else f"the first: {places[0]}"
            warn(f"{images}: {what}; {remedy} ({first})")


def _colours(image: Any) -> Note | None:
    """A note if almost nothing is left of what a viewer shows."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        low, high = image.getextrema()
        # NaN is neither.
        if high > 255 or low < 0 or low < high <= 1:
            return Note("deep", f"values from {low:g} to {high:g}")
    elif image.mode in ("RGBA", "LA"):
        *colours, (least, most) = image.getextrema()
        if least < most and all(high - low < VISIBLE for low, high in colours):
            return Note("transparent", "one colour under transparency")
    elif image.mode == "P" and "transparency" in image.info:
        return _palette_colours(image)
    return None


def _palette_colours(image: Any) -> Note | None:
    given, palette = image.info["transparency"], image.getpalette("RGB") or []
    used = [index for _, index in image.getcolors(256) or ()]
    if isinstance(given, bytes):
        opacities = {given[index] if index < len(given) else 255 for index in used}
    else:
        opacities = {index == given for index in used}
    channels = [[palette[3 * i + band] for i in used if 3 * i < len(palette)] for band in range(3)]
    if len(opacities) > 1 and all(max(c) - min(c) < VISIBLE for c in channels if c):
        return Note("transparent", "one colour under transparency")
    return None


def _pages(image: Image.Image) -> Note | None:
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        return Note("pages", "an animation, the first frame is read")
    if image.format not in PAGED:
        return None
    pages = 1
    try:
        while pages < MOST_PAGES_COUNTED:
            image.seek(pages)
            pages += 1
    except FAULTS:
        # The last page, or the next one is damaged.
        return Note("pages", f"{pages} pages, the first is read") if pages > 1 else None
    return Note("pages", f"{pages} pages or more, the first is read")
