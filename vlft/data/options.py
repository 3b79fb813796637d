"""How data files are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.data.conversation import Conversation
    from vlft.data.encode import EncodedSample
    from vlft.data.split import Position

Encode = Callable[["Conversation"], "EncodedSample"]


@dataclass(frozen=True)
class History:
    """What a run that goes on, or is answered, has decided before.

    Attributes:
        validation: positions of the validation records that were split off; None to split anew.
        older_release: whether the run was started by a release without split.json, whose rules of
            drawing and splitting are applied then.
    """

    validation: tuple[Position, ...] | None = None
    older_release: bool = False


@dataclass(frozen=True)
class DataOptions:
    """How data files are read; see the flags of the same names."""

    image_tag: str
    image_token_id: int
    image_root: Path | None = None
    # The only folder that images are read from, besides downloaded ones; None for any.
    confine_images: Path | None = None
    # Whether images are downloaded from addresses that are not public.
    allow_private_urls: bool = False
    # Whether images are turned by their EXIF orientation.
    rotate: bool = False
    need_response: bool = True
    on_bad_sample: str = "error"
    on_long: str = "error"
    max_length: int | None = None
    # The longest sample that the model takes, in tokens; None if there is no limit.
    model_length: int | None = None
    seed: int = 0
    history: History = field(default_factory=History)
