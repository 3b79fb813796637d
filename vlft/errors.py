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

import difflib
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROBLEMS_SHOWN = 20
# JSON and terminals can give a lone surrogate, which neither tokenizers nor file systems accept.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What would steer a terminal or begin a line: C0, C1, separators of lines, directions of writing.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
# Most characters of a message, and of its place or hint.
LONGEST = 1500
# The hint of a fault that is not the user's.
REPORT = "please report it with the output of vlft env"


class VlftError(Exception):
    """Base of every error that is shown as text, never as a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, place: str = "", hint: str = "") -> None:
        super().__init__(message, place, hint)
        # All three may hold text of a file.
        self.message = short(printable(message))  # what was found, and what is allowed
        self.place = short(printable(place))  # e.g. ``train.jsonl:17`` or ``--lora-rank``
        self.hint = short(printable(hint))  # what to do next

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, with which ranks exchange errors: __init__ takes no such arguments."""
        return _unpickled, (type(self), self.args), self.__dict__

    def __str__(self) -> str:
        head = f"{self.place}: {self.message}" if self.place else self.message
        return f"{head}\n hint: {self.hint}" if self.hint else head


def _unpickled(kind: type[VlftError], args: tuple[Any, ...]) -> VlftError:
    return kind.__new__(kind, *args)


class VerificationError(VlftError):
    """A result that was checked against a second computation and differs."""


class StoppedError(VlftError):
    """The user ended the command, with Ctrl-C."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("stopped; what was saved before is whole")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the CPU."""
    # torch has no class for that of the CPU; its OutOfMemoryError is not imported for it here.
    names = {kind.__name__ for kind in type(error).__mro__}
    text = "DefaultCPUAllocator" in str(error) and "memory" in str(error)
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or text


@contextmanager
def explaining_memory(doing: str, lower: str, place: str = "") -> Iterator[None]:
    """Turns running out of memory into an error.

    Args:
        doing: goes on "out of memory ...", e.g. ``while the model is loaded``.
        lower: what to lower or to use instead.
        place: the device, or what was being worked on.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise VlftError(f"out of memory {doing}", place=place, hint=lower) from error


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


def printable(text: str, keep: str = "") -> str:
    """The text with control characters as Python writes them in a string, but for ``keep``."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return CONTROL.sub(escape, text)


def shown(path: str | Path) -> str:
    """The path for a message: relative to the working folder if inside it, shortened if long."""
    whole, here = Path(path), Path.cwd()
    text = str(whole.relative_to(here)) if whole.is_relative_to(here) else str(path)
    return short(text, 160)


def short(text: str, longest: int = LONGEST) -> str:
    """The text without its middle if it is longer."""
    cut = longest * 3 // 8
    return text if len(text) <= longest + 40 else f"{text[: longest - cut]}...{text[-cut:]}"


def raise_all(problems: Sequence[UsageError]) -> None:
    """Raises the problem, or a CollectedError of several; returns if there is none."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CollectedError(problems)


def unknown_name(name: str, known: list[str], *, place: str, what: str) -> ConfigError:
    """The error for a name that does not exist; its hint is the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
    return ConfigError(f"unknown {what} {name!r}", place=place, hint=hint)
