"""What rows are planned from: the outlines of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.data.encode import IGNORE, REPLY

if TYPE_CHECKING:
    from vlft.data.encode import EncodedImage, EncodedSample


@dataclass(frozen=True)
class Outline:
    """What rows are planned from: a few hundred bytes, kept for every sample of a run.

    Attributes:
        ids: (E,) int32, token ids; an image is a single element with the id of the image token.
            Where replies have a window, REPLY is added to the ids of theirs.
        places: indices of the images in ids.
        images: in order.
        tokens: length of the sample, all tokens of its images included.
        targets: how many of them are trained.
        as_text: see EncodedSample.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    places: tuple[int, ...]
    images: tuple[EncodedImage, ...]
    tokens: int
    targets: int
    as_text: tuple[str, ...] = ()

    def prefix_tokens(self, elements: int) -> int:
        """Number of tokens in the first ``elements`` elements."""
        inside = zip(self.places, self.images, strict=True)
        return elements + sum(image.tokens - 1 for place, image in inside if place < elements)


def outline(sample: EncodedSample, image_token_id: int) -> Outline:
    """The outline of an encoded sample."""
    ids = sample.input_ids.numpy()
    kept = ids != image_token_id
    positions = np.flatnonzero(~kept)
    lengths = [image.tokens for image in sample.images]
    # Adjacent images form a single run of image tokens, so runs cannot be counted.
    firsts = positions[np.cumsum([0, *lengths[:-1]])] if lengths else positions
    kept[firsts] = True
    places = np.cumsum(kept)[firsts] - 1
    # The first token has no predecessor that could predict it.
    targets = int((sample.labels[1:] != IGNORE).sum())
    targets += sum(image.codes for image in sample.images)
    elements = ids[kept].astype(np.int32)
    if sample.window is not None:
        elements[np.flatnonzero(kept) >= sample.prompt_tokens] += REPLY
    where = tuple(places.tolist())
    return Outline(elements, where, sample.images, len(ids), targets, sample.as_text)
