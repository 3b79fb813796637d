"""The rich Console of each stream. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from vlft.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Item = TypeVar("Item")
# Seconds between lines about long work, where there is no terminal for a bar.
LINE_EVERY = 10.0

out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(soft_wrap=True, highlight=False, emoji=False, stderr=True)


def reply(text: str) -> None:
    """Writes a model's reply to stdout: no wrapping, no markup, tabs kept.

    Only at a terminal control characters are escaped.
    """
    if out.is_terminal:
        text = printable(text, keep="\n\t")
    try:
        out.file.write(text)
    except UnicodeEncodeError as error:
        # A character that the encoding of stdout lacks must not end a chat.
        out.file.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    out.file.flush()


def info(message: str) -> None:
    """Prints a line about what the command is doing, on the first rank."""
    if _is_first_rank():
        err.print(printable(message), markup=False)


def warn(message: str) -> None:
    """Prints a warning, on the first rank: the command goes on, but the user should know."""
    if _is_first_rank():
        err.print("warning: ", style="yellow", end="")
        err.print(printable(message), markup=False)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


@contextmanager
def working(what: str, after: float = 1.0) -> Iterator[None]:
    """Shows what the block is busy with, once it has taken ``after`` seconds.

    On a terminal this is a spinner that disappears with the block; otherwise one line. Blocks may
    be nested and may hold progress bars, but must not print to stdout. Only the first rank of a
    distributed run shows anything.
    """
    if not _is_first_rank():
        yield
    elif err.is_terminal:
        with _spinner(what, after):
            yield
    else:
        timer = threading.Timer(after, info, [what])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def _spinner(what: str, after: float) -> Iterator[None]:
    """A spinner from ``after`` seconds on, until the block ends."""
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    text = Text(printable(what))
    # A line that wraps could not be erased.
    text.truncate(err.width - 4, overflow="ellipsis")
    spinner = Spinner("dots", text)
    begin = time.monotonic() + after
    live = Live(
        get_renderable=lambda: spinner if time.monotonic() >= begin else "",
        console=err,
        transient=True,
        # A library that is imported meanwhile must not keep rich's stand-ins for these streams.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live:
        yield


def tracked(
    items: Iterable[Item], what: str, total: int, note: Callable[[], str] = str
) -> Iterator[Item]:
    """The items one by one, with a progress bar on a terminal.

    Elsewhere a line says what is done, and every LINE_EVERY seconds how far that is.

    Args:
        items: to pass on.
        what: is done with them.
        total: number of items.
        note: what else there is to say, such as a speed; empty for nothing.
    """
    from rich.progress import Progress

    if not err.is_terminal:
        with working(what):
            yield from _with_lines(items, what, total, note)
        return
    with Progress(console=err, transient=True) as live:
        task = live.add_task(what, total=total)
        for item in items:
            yield item
            live.update(task, advance=1, description=", ".join(filter(None, (what, note()))))


def _with_lines(
    items: Iterable[Item], what: str, total: int, note: Callable[[], str]
) -> Iterator[Item]:
    begin = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= LINE_EVERY:
            minutes, seconds = divmod(round((now - begin) / max(done, 1) * (total - done)), 60)
            parts = (f"{done:,} of {total:,}", f"{minutes}:{seconds:02} left", note())
            info(f"{what}: {', '.join(filter(None, parts))}")
            said = now
        yield item


def show_error(text: str) -> None:
    """Prints an error message, one ``error:`` at the start of each problem."""
    for line in text.splitlines():
        if line.startswith((" hint:", "...")):
            err.print(line, style="dim", markup=False)
        else:
            err.print("error: ", style="bold red", end="")
            err.print(line, markup=False)
