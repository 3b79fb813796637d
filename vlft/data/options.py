"""How data files are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlft.data.names import ROLES, role_of
from vlft.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from vlft.data.split import Position


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
class Reading:
    """How a record is read; see the flags of the same names.

    Attributes:
        image_tag: the family's own, read like ``<image>``.
        need_response: whether a missing reply is an error (training) or a question (inference).
        has_boxes: whether the family has tags for boxes.
        columns: role of a conversation -> the column that has it.
        drawn_replies: whether images that are replies are read; a question needs none.
    """

    image_tag: str = "<image>"
    need_response: bool = True
    has_boxes: bool = False
    layout: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    answers: str | None = None
    preference: str | None = None
    objects: str | None = None
    qa: str = "turns"
    loss_on: str = "all"
    drawn_replies: bool = True


@dataclass(frozen=True)
class DataOptions:
    """How data files are read; see the flags of the same names."""

    reading: Reading = field(default_factory=Reading)
    image_root: Path | None = None
    # The only folder that images are read from, besides downloaded ones; None for any.
    confine_images: Path | None = None
    # Whether images are downloaded from addresses that are not public.
    allow_private_urls: bool = False
    # Whether images are turned by their EXIF orientation.
    rotate: bool = False
    on_bad_sample: str = "error"
    on_long: str = "error"
    max_length: int | None = None
    # The longest sample that the model takes, in tokens; None if there is no limit.
    model_length: int | None = None
    seed: int = 0
    # Whether nothing is trained: the data is reported on, with what its images look like.
    is_check: bool = False
    # Whether data without an image is worth a word.
    expects_images: bool = True
    # Whether the validation records of the history alone are read.
    only_validation: bool = False
    history: History = field(default_factory=History)


def reading_of(
    settings: Any, image_tag: str, *, has_boxes: bool = False, need_response: bool = True
) -> Reading:
    """How the settings of a command say that records are read.

    Raises:
        ConfigError: ``--columns`` names no role.
    """
    names = ("layout", "prompt", "answers", "preference", "objects", "qa", "loss_on")
    given = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    columns = parse_columns(settings.columns)
    return Reading(
        image_tag, need_response, has_boxes, columns=columns, drawn_replies=need_response, **given
    )


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """Role -> column, from texts like ``response=label,images=photo``.

    Raises:
        ConfigError: a part is not of this form, or names no role or one twice.
    """
    columns: dict[str, str] = {}
    for part in (part for text in given for part in text.split(",")):
        name, mark, column = part.partition("=")
        role = role_of(name.strip())
        if not mark or role is None or not column or role in columns:
            raise ConfigError(
                f"found {part!r}" + (" for a second column" if role in columns else ""),
                place="--columns",
                hint=f"write e.g. response=label; before = may stand {', '.join(ROLES)}",
            )
        columns[role] = column
    return columns
