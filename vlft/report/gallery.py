"""Records with their images and replies -> cards; boxes of replies are drawn on the image."""

from __future__ import annotations

import base64
import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.data.boxes import LARGEST
from vlft.data.images import decoded
from vlft.data.ocr_blocks import BOX, TYPE
from vlft.data.result_fields import result_lists
from vlft.errors import DataError
from vlft.evaluation.boxes import DETECTION
from vlft.report.charts import COLOURS
from vlft.report.page import text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Longest side of an image in pixels, and images of a record.
SIDE, IMAGES = 320, 4
# Longest text that is shown of a prompt or a reply.
LONGEST = 2000


@dataclass(frozen=True)
class Card:
    """A record of a gallery.

    Attributes:
        images: files of the record.
        texts: (name, text) of prompt, label, replies.
        scores: one line.
        boxed: the reply whose boxes are drawn.
        drawings: (name, file) of replies that are images.
    """

    images: Sequence[Path]
    texts: Sequence[tuple[str, str]]
    scores: str
    boxed: str = ""
    drawings: Sequence[tuple[str, Path]] = ()


def gallery(cards: Sequence[Card]) -> str:
    """The cards; empty if there is none."""
    body = "".join(map(_card, cards))
    return f'<div class="cards">{body}</div>' if body else ""


def card_of(row: Any) -> list[Card]:
    """The card of a result line; none of what is no result line."""
    if not isinstance(row, dict) or not isinstance(row.get("response"), str):
        return []
    names = {"prompt": "query", "label": "label", "reply": "response"}
    texts = [(name, str(row[key])) for name, key in names.items() if row.get(key)]
    return [Card(images_of(row), texts, "", row["response"])]


def images_of(row: Mapping[str, Any]) -> list[Path]:
    """The image files of a result line."""
    images = result_lists(dict(row)).get("images")
    return [Path(image) for image in images if isinstance(image, str)] if images else []


def drawing_of(row: Mapping[str, Any], reply: str) -> Path | None:
    """The image file that a reply names, if the line is one of ``vlft draw``."""
    path = Path(reply)
    return path if path.name and row.get("drawing") == path.name else None


def _card(card: Card) -> str:
    # Boxes say nothing of which image they are on.
    boxes = _boxes(card.boxed) if len(card.images) == 1 else ""
    images = "".join(
        f'<span class="image">{_thumbnail(path)}{boxes}</span>' for path in card.images[:IMAGES]
    )
    images += "".join(
        f'<span class="image">{_thumbnail(path)}<span class="dim">{text(name)}</span></span>'
        for name, path in card.drawings
    )
    lines = "".join(
        f'<p><span class="dim">{text(name)}</span> {text(value[:LONGEST])}</p>'
        for name, value in card.texts
    )
    return f'<div class="card">{images}{lines}<p class="dim">{text(card.scores)}</p></div>'


def _thumbnail(path: Path) -> str:
    """The image as part of the page; its name if it cannot be read any more."""
    with suppress(DataError, OSError), decoded(path) as image:
        small = image.copy()
        small.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        width, height = small.size
        return f'<img width="{width}" height="{height}" alt="" src="data:image/jpeg;base64,{data}">'
    return f'<span class="dim">{text(path.name)} cannot be read</span>'


def _boxes(reply: str) -> str:
    """The boxes of a reply's tags with their names, to lay over an image."""
    drawn = []
    for number, (name, inside) in enumerate(DETECTION.findall(reply)):
        kind = TYPE.match(inside)
        colour = f"var(--c{number % COLOURS})"
        for found in BOX.finditer(inside):
            left, upper, right, lower = (float(value) for value in found.groups())
            drawn.append(
                f'<rect x="{left}" y="{upper}" width="{max(0.0, right - left)}" '
                f'height="{max(0.0, lower - upper)}" fill="none" stroke-width="2" '
                f'vector-effect="non-scaling-stroke" style="stroke:{colour}"/>'
                f'<text x="{left + 8}" y="{upper + 40}" style="fill:{colour};font-size:36px">'
                f"{text((name or (kind[1] if kind else ''))[:40])}</text>"
            )
    if not drawn:
        return ""
    box = f"0 0 {LARGEST} {LARGEST}"
    return f'<svg viewBox="{box}" preserveAspectRatio="none">{"".join(drawn)}</svg>'
