"""Images that look alike although their files differ: resized, compressed again, made brighter.

The look of an image is its 16 x 16 thumbnail in gray; two images are alike if their thumbnails
correlate. Over the photos, charts, pages and handwritten digits that the tests have, images that
were resized, compressed again as JPEG or made a fifth brighter correlate with what they were by
0.996 and more (digits, when brighter, by 0.988), different photos by at most 0.92, and different
digits by at most 0.991.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SIDE = 16
ALIKE = 0.995
# Standard deviation of the grays of an image, of 255, below which there is nothing to compare.
FLAT = 2.0
# Images that are compared with all others at once.
AT_ONCE = 1024


def look_of(image: Image.Image) -> bytes:
    """The look of a decoded image, SIDE x SIDE bytes."""
    if image.mode not in ("RGB", "L"):
        # Only a small image can be copied in another mode without much memory.
        image.thumbnail((8 * SIDE, 8 * SIDE), Image.Resampling.NEAREST)
        image = image.convert("RGB")
    size = (4 * SIDE, 4 * SIDE)
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0).convert("L")
    return small.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def alike(some: Sequence[bytes], others: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """(index in some, index in others) of each of some that looks like one of the others."""
    if not some or not others:
        return
    known = _normed(others)
    for start in range(0, len(some), AT_ONCE):
        found = _normed(some[start : start + AT_ONCE]) @ known.T
        nearest = found.argmax(axis=1)
        for index in np.flatnonzero(found.max(axis=1) >= ALIKE).tolist():
            yield start + index, int(nearest[index])


def _normed(looks: Sequence[bytes]) -> Any:
    """(I, SIDE * SIDE) looks with a mean of 0 and a length of 1; flat ones are 0."""
    grays = np.frombuffer(b"".join(looks), np.uint8).reshape(len(looks), -1).astype(np.float32)
    grays -= grays.mean(axis=1, keepdims=True)
    lengths = np.sqrt((grays**2).sum(axis=1, keepdims=True))
    is_flat = lengths < FLAT * SIDE
    return np.where(is_flat, 0, grays / np.where(is_flat, 1, lengths))
