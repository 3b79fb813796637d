"""The errors that a user can meet.

    VlftError            exit code 1   the work failed for a reason that is not the input
    ├── VerificationError              a result that was checked and is not right
    ├── StoppedError     exit code 130 the user ended the command
    └── UsageError       exit code 2   the input must change
        ├── ConfigError                settings: flags, configuration file, what they ask for
        ├── DataError                  a data file, a record of it, one of its images
        └── CheckpointError            a model, adapter or run folder

Every message has four parts: the place, what was found there, what is allowed, what to do next.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBLEMS_SHOWN = 20
# JSON and terminals can give a lone surrogate, which neither tokenizers nor file systems accept.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


class VlftError(Exception):
    """Base of every error that is shown as text, never as a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, place: str = "", hint: str = "") -> None:
        super().__init__(message, place, hint)
        self.message = message  # what was found, and what is allowed
        self.place = place  # e.g. ``train.jsonl:17`` or ``--lora-rank``
        self.hint = hint  # what to do next

    def __str__(self) -> str:
        head = f"{self.place}: {self.message}" if self.place else self.message
        return f"{head}\n hint: {self.hint}" if self.hint else head


class VerificationError(VlftError):
    """A result that was checked against a second computation and differs."""


class StoppedError(VlftError):
    """The user ended the command, with Ctrl-C."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("stopped; what was saved before is whole")


class UsageError(VlftError):
    """The input must change before the command can work."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting, or a combination of settings, that cannot be used."""


class DataError(UsageError):
    """A data file, a record or an image that cannot be used."""


class CheckpointError(UsageError):
    """A model, adapter or run folder that cannot be used."""


class CollectedError(UsageError):
    """Several problems of the input, in its order: the first are shown, the rest are counted."""

    def __init__(self, problems: Sequence[UsageError]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = list(map(str, self.problems[:PROBLEMS_SHOWN]))
        rest = len(self.problems) - PROBLEMS_SHOWN
        return "\n".join([*lines, f"... and {rest} more"] if rest > 0 else lines)


def shown(path: str | Path) -> str:
    """The path for a message: relative to the working folder if inside it, shortened if long."""
    whole, here = Path(path), Path.cwd()
    text = str(whole.relative_to(here)) if whole.is_relative_to(here) else str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}"


def raise_all(problems: Sequence[UsageError]) -> None:
    """Raises the problem, or a CollectedError of several; returns if there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CollectedError(problems)
