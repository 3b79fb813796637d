"""The frame of a report: one HTML file without scripts and without network, light and dark.

All text that comes from data is escaped here, in ``text`` and ``table``; a policy in the page's
head lets a browser run no script and load nothing, whatever is written into it.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from vlft import __version__
from vlft.errors import CheckpointError, printable, shown
from vlft.files import open_regular, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

NAME = "report.html"
# The start of every report, by which a file of ours is known.
MARK = "<!DOCTYPE html>\n<!-- report of vlft -->\n"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --dim: #6a6a6a; --line: #d8d8d8; --back: #fff;
  --c0: #1f6fb4; --c1: #d9730d; --c2: #2b8a3e; --c3: #b02a37; --c4: #7048a8; --c5: #0b7f86; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --dim: #a0a0a0; --line: #3c3c3c;
  --back: #161616; --c0: #6cb2f0; --c1: #f0a35a; --c2: #77c98a; --c3: #f08a92; --c4: #b897e8;
  --c5: #62c6cc; } }
body { margin: 1rem auto; max-width: 70rem; padding: 0 .8rem; background: var(--back);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
.charts, .cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; } figcaption, .dim { color: var(--dim); font-size: .85rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
.card p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.image { position: relative; display: inline-block; margin: 0 .3rem .3rem 0; }
.image img { display: block; max-width: 100%; min-width: 6rem; height: auto; }
svg { max-width: 100%; height: auto; }
.image svg { position: absolute; inset: 0; width: 100%; height: 100%; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
"""


def text(value: Any) -> str:
    """A value as HTML text; what is no character of UTF-8 text as Python writes it in a string."""
    whole = printable(str(value), keep="\n\t").encode("utf-8", "backslashreplace")
    return escape(whole.decode("utf-8"))


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; its cells are text."""
    head = "".join(f"<th>{text(cell)}</th>" for cell in heads)
    lines = ("".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def section(title: str, body: str, *, folded: bool = False) -> str:
    """A part of a report; empty without a body.

    Args:
        title: text.
        body: HTML.
        folded: whether it is shown once the reader opens it.
    """
    if not body:
        return ""
    head = f"<h2>{text(title)}</h2>"
    if folded:
        return f"<details><summary>{text(title)}</summary>{body}</details>"
    return f"<section>{head}{body}</section>"


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    """Writes a report, in place of an older one as a whole."""
    body = "\n".join(part for part in sections if part)
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    write_whole(
        path,
        f'{MARK}<html lang="en"><head>{head}{view}<title>{text(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{text(title)}</h1>\n{body}\n"
        f'<p class="dim">vlft {__version__}</p></body></html>\n',
    )


def check_own_page(path: Path) -> None:
    """Raises CheckpointError if there is something that vlft has not written."""
    if not path.exists() and not path.is_symlink():
        return
    is_ours = path.is_file() and not path.is_symlink()
    if is_ours:
        with open_regular(path) as file:
            is_ours = file.read(len(MARK)) in (MARK.encode(), b"")
    if not is_ours:
        hint = "move it away: a report is written there"
        raise CheckpointError("vlft has not written this", place=shown(path), hint=hint)
