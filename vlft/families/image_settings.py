"""What a user sets about images beyond the files of a checkpoint, and where a merged model has it.

--exif rotate                     turns images by their EXIF orientation
--image-mode                      chooses how a page becomes views, in families with modes
--max-tiles, --max-image-tokens   leave out grids of tiles, in families with tiles
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError, ConfigError, shown
from vlft.families.base import PREPROCESSOR_FILE, PROCESSOR_FILE
from vlft.families.pixels import EXIF
from vlft.families.schemas import PROCESSOR
from vlft.files import read_object
from vlft.settings import flag

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.families.base import Pixels
    from vlft.families.processor import Processor

ROTATE = "rotate"


@dataclass(frozen=True)
class ImageSettings:
    """The settings of the same names; auto and None leave the images to the checkpoint."""

    exif: str = "auto"
    max_tiles: int | None = None
    max_image_tokens: int | None = None
    image_mode: str | None = None

    @classmethod
    def of(cls, config: Any, run: Any = None) -> ImageSettings:
        """Those of a command; what it leaves open is as in the run, if there is one."""
        given = {name: getattr(config, name) for name in cls.__dataclass_fields__}
        if run is not None:
            given = {k: getattr(run, k) if v is None else v for k, v in given.items()}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def changed(self) -> dict[str, Any]:
        """Those that differ from the defaults."""
        defaults = asdict(ImageSettings())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    def apply(self, processor: Processor, source: Path | None = None) -> Processor:
        """The processor of a checkpoint with these settings.

        Args:
            processor: of the checkpoint.
            source: the file that states them, if the user has not.

        Raises:
            UsageError: the family has no tiles, or no grid of tiles is left.
        """
        try:
            pixels = self._limited(processor)
        except ConfigError as error:
            if source is None:
                raise
            place, hint = f"{shown(source)}, {error.place}", "copy the file from a backup"
            raise CheckpointError(error.message, place=place, hint=hint) from None
        if self.exif == ROTATE:
            pixels = replace(pixels, rotate=True)
        chat = replace(processor.chat, view=pixels.view, rotate=pixels.rotate)
        return replace(processor, pixels=pixels, chat=chat)

    def _in_mode(self, processor: Processor) -> Pixels:
        mode, pixels = self.image_mode, processor.pixels
        if mode is None:
            return pixels
        if pixels.in_mode is None or mode not in pixels.modes:
            hint = f"allowed: {', '.join(pixels.modes)}" if pixels.modes else "leave it out"
            found = f"{processor.family.title} has no image mode {mode}"
            raise ConfigError(found, place="--image-mode", hint=hint)
        return replace(pixels.in_mode(mode), rotate=pixels.rotate)

    def _limited(self, processor: Processor) -> Pixels:
        pixels = self._in_mode(processor)
        given = [name for name in ("max_tiles", "max_image_tokens") if name in self.changed]
        if not given:
            return pixels
        if pixels.limit is None:
            mode = f" in mode {self.image_mode}" if self.image_mode else ""
            raise ConfigError(
                f"{processor.family.title} has no tiles{mode}, which could be limited",
                place=", ".join(map(flag, given)),
                hint="leave it out",
            )
        limited = pixels.limit(self.max_tiles, self.max_image_tokens)
        return replace(limited, rotate=pixels.rotate)


def state_image_settings(
    folder: Path, settings: ImageSettings, base: Processor, source: Path | None = None
) -> None:
    """Writes into the files of a trained model how its images are treated.

    Args:
        folder: of the model.
        settings: of the run.
        base: processor of the model that the run started from.
        source: the file that states the settings, if the user has not.

    Raises:
        UsageError: they cannot be applied.
    """
    treated = settings.apply(base, source)
    stated = {name: dict(entries) for name, entries in treated.pixels.stated.items()}
    if treated.pixels.rotate and not base.pixels.rotate:
        name = PREPROCESSOR_FILE if (folder / PREPROCESSOR_FILE).is_file() else PROCESSOR_FILE
        stated[name] = {**stated.get(name, {}), EXIF: ROTATE}
    for name, entries in stated.items():
        path = folder / name
        path.write_text(
            json.dumps({**read_object(path, PROCESSOR), **entries}, indent=2) + "\n", "utf-8"
        )
