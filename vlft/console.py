"""The one rich Console of each stream. Results go to stdout, everything else to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Item = TypeVar("Item")

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(soft_wrap=True, highlight=False, emoji=False, stderr=True)


def reply(text: str) -> None:
    """Writes a model's words to stdout as they are: no wrapping, no markup, no tabs replaced."""
    out.file.write(text)
    out.file.flush()


def info(message: str) -> None:
    """Prints a line of what the command is doing."""
    err.print(message, markup=False)


def warn(message: str) -> None:
    """Prints a warning: the command goes on, the user should know."""
    err.print("warning: ", style="yellow", end="")
    err.print(message, markup=False)


def tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, one by one, with a bar of how far it is where somebody looks on."""
    from rich.progress import Progress

    with Progress(console=err, disable=not err.is_terminal, transient=True) as live:
        yield from live.track(items, total=total, description=what)


def show_error(text: str) -> None:
    """Prints an error message, one ``error:`` at the start of each problem."""
    for line in text.splitlines():
        if line.startswith((" hint:", "...")):
            err.print(line, style="dim", markup=False)
        else:
            err.print("error: ", style="bold red", end="")
            err.print(line, markup=False)
