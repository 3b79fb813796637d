"""TEDS: tables as trees, in HTML or Markdown.

table ── (thead, tbody) ── tr ── td with its text, colspan and rowspan
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import TYPE_CHECKING, NamedTuple

from vlft.evaluation.edits import edit_distance
from vlft.evaluation.trees import Tree, tree_distance

if TYPE_CHECKING:
    from collections.abc import Sequence

TABLE = re.compile(r"<table\b.*?(?:</table\s*>|\Z)", re.DOTALL | re.IGNORECASE)
# A row of a Markdown table, and the second one, which makes it a table.
ROW = re.compile(r"[ \t]*\|(.*)\|[ \t]*")
RULE = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
BETWEEN = re.compile(r"(?<!\\)\|")
# An element that starts -> the open ones that it ends, as HTML allows to leave their tags out.
ENDS = {
    "td": ("td", "th"),
    "th": ("td", "th"),
    "tr": ("td", "th", "tr"),
    **dict.fromkeys(("thead", "tbody", "tfoot"), ("td", "th", "tr", "thead", "tbody", "tfoot")),
}
VOID = ("br", "img", "hr", "wbr", "col", "input")
GROUPS = ("thead", "tbody", "tfoot")


class _Node(NamedTuple):
    """The label of a node; the text of a cell is characters and tags."""

    tag: str
    colspan: int = 1
    rowspan: int = 1
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Table:
    """A table, and the number of its elements, those within cells included."""

    tree: Tree[_Node]
    count: int


def teds(reply: str, reference: str) -> float:
    """Similarity of tables, 0 to 1: 1 - edits of their trees by nodes (Zhong et al. 2020).

    As PubTabNet's TEDS: a cell in the place of another costs the share of its characters that
    differ. Text outside of tables does not count. Several tables are compared in order; a missing
    or surplus one is 0. If one side is Markdown, header cells and thead, tbody, tfoot do not count.

    Raises:
        ValueError: the reference has no table.
    """
    wanted, found = _table_texts(reference), _table_texts(reply)
    if not wanted:
        raise ValueError("has no table in HTML or Markdown, which teds compares")
    scores = map(_similarity, found, wanted)
    return sum(scores) / max(len(wanted), len(found))


def _similarity(found: str, wanted: str) -> float:
    plain = not (found.startswith("<") and wanted.startswith("<"))
    one, other = (_parsed(text, plain=plain) for text in (found, wanted))
    edits = tree_distance(one.tree, other.tree, _replacement)
    return max(0.0, 1 - edits / max(one.count, other.count, 1))


def _replacement(one: _Node, other: _Node) -> float:
    """Cost of a node in the place of another."""
    if one[:3] != other[:3]:
        return 1.0
    if not one.text and not other.text:
        return 0.0
    return edit_distance(one.text, other.text) / max(len(one.text), len(other.text))


def _table_texts(text: str) -> list[str]:
    """The tables in a text, as they stand there."""
    found: list[tuple[int, str]] = [(m.start(), m[0]) for m in TABLE.finditer(text)]
    outside = TABLE.sub(lambda m: " " * len(m[0]), text)
    lines, place = outside.split("\n"), 0
    starts = []
    for line in lines:
        starts.append(place)
        place += len(line) + 1
    number = 0
    while number + 1 < len(lines):
        end = number
        if ROW.fullmatch(lines[number]) and RULE.fullmatch(lines[number + 1]):
            while end < len(lines) and ROW.fullmatch(lines[end]):
                end += 1
            found.append((starts[number], "\n".join(lines[number:end])))
        number = max(end, number + 1)
    return [table for _, table in sorted(found)]


def _parsed(text: str, *, plain: bool) -> _Table:
    if not text.startswith("<"):
        return _markdown(text)
    parser = _Parser(plain=plain)
    parser.feed(text)
    parser.close()
    return _Table(parser.table, parser.count)


def _markdown(text: str) -> _Table:
    """The table that Markdown writes, without the line below its head."""
    table: Tree[_Node] = Tree(_Node("table"))
    count = 0
    for number, line in enumerate(text.split("\n")):
        row = ROW.fullmatch(line)
        if number == 1 or row is None:
            continue
        cells = [cell.strip().replace("\\|", "|") for cell in BETWEEN.split(row[1])]
        table.children.append(
            Tree(_Node("tr"), [Tree(_Node("td", text=tuple(cell))) for cell in cells])
        )
        count += 1 + len(cells)
    return _Table(table, count)


class _Parser(HTMLParser):
    """The tree of a table, as PubTabNet's reader makes it of lxml's.

    Cells are leaves; elements within them are part of their text. Of header cells (th) the elements
    within are nodes, and their text does not count, unless ``plain``, where they are cells too.
    """

    def __init__(self, *, plain: bool) -> None:
        super().__init__(convert_charrefs=True)
        self._plain = plain
        self._open: list[tuple[str, Tree[_Node] | None]] = []
        self._cell: list[str] | None = None
        self._span = (1, 1)
        self.table: Tree[_Node] = Tree(_Node("table"))
        self.count = 0

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        tag = "td" if self._plain and tag == "th" else tag
        if tag == "table" and not self._open:
            self._open.append((tag, self.table))
            return
        if tag in ENDS and not self._is_nested():
            self._close(ENDS[tag])
        if self._plain and tag in GROUPS:
            return
        self.count += 1
        if self._cell is not None:
            self._cell.append(f"<{tag}>")
            if tag not in VOID:
                self._open.append((tag, None))
            else:
                self._cell.append(f"</{tag}>")
            return
        parent = next((node for _, node in reversed(self._open) if node), self.table)
        if tag == "td":
            spans = dict(attrs)
            self._span = (_number(spans.get("colspan")), _number(spans.get("rowspan")))
            self._cell = []
            self._open.append((tag, parent))
            return
        node: Tree[_Node] = Tree(_Node(tag))
        parent.children.append(node)
        if tag not in VOID:
            self._open.append((tag, node))

    def handle_endtag(self, tag: str) -> None:
        """See HTMLParser."""
        tag = "td" if self._plain and tag == "th" else tag
        names = [name for name, _ in self._open]
        if tag in names and not (self._plain and tag in GROUPS):
            while self._open and self._open[-1][0] != tag:
                self._pop()
            self._pop()

    def handle_data(self, data: str) -> None:
        """See HTMLParser."""
        if self._cell is not None:
            self._cell += data

    def close(self) -> None:
        """Ends what is open, as in a reply that was cut off."""
        super().close()
        while self._open:
            self._pop()

    def _is_nested(self) -> bool:
        """Whether a table within a cell is open."""
        return any(name == "table" for name, _ in self._open[1:])

    def _close(self, names: Sequence[str]) -> None:
        """Ends the innermost open elements of these names."""
        while any(name in names for name, _ in self._open):
            self._pop()

    def _pop(self) -> None:
        tag, node = self._open.pop()
        if self._cell is None:
            return
        if tag == "td" and node is not None:
            node.children.append(Tree(_Node("td", *self._span, tuple(self._cell))))
            self._cell = None
        else:
            self._cell.append(f"</{tag}>")


def _number(text: str | None) -> int:
    """The value of a colspan or rowspan; 1 if it is no number, as browsers read it."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,4}", text) else 1
