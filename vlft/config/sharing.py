"""Settings of vlft push."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.shared import makers
from vlft.settings import Rule, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

_model, _output = makers("Model", "Output")


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class PushConfig(Settings):
    """Settings of ``vlft push``."""

    folder: Path | None = _model(
        None, "Run, checkpoint-N, adapter or model folder; of a run the best checkpoint.",
        argument=True)
    repo: str | None = _model(
        None, "Repository on the hub, OWNER/NAME; without one the card alone is written.",
        argument=True)
    run: Path | None = _model(
        None, "Run that the card tells of.", default_text="that of FOLDER, if it is in one")

    public: bool = _output(False, "Make a new repository public; it is private otherwise.")
    overwrite: bool = _output(False, "Add a commit to a repository that exists.")

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        sound = re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo or "o/n")
        return (
            (self.folder is None, "vlft push", "found no folder",
             "write e.g. vlft push output/MODEL/v0-... OWNER/NAME"),
            (not sound, "REPO", f"found {self.repo!r}", "write OWNER/NAME, as on the hub"),
            (self.repo is None and (self.public or self.overwrite), "--public, --overwrite",
             "no repository is named", None),
        )
# fmt: on
