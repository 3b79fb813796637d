"""Edits that turn one ordered tree into the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Label = TypeVar("Label")


@dataclass
class Tree(Generic[Label]):
    """A node with its children in order."""

    label: Label
    children: list[Tree[Label]] = field(default_factory=list)


class _Order(Generic[Label]):
    """The nodes of a tree, children before their parents.

    Attributes:
        labels: of the nodes.
        firsts: of each node, the number of its leftmost leaf.
        roots: numbers of the nodes that have a sibling before them, and of the root.
    """

    def __init__(self, tree: Tree[Label]) -> None:
        self.labels: list[Label] = []
        self.firsts: list[int] = []
        stack = [(tree, False)]
        open_from: list[int] = []
        while stack:
            node, is_done = stack.pop()
            if is_done:
                self.firsts.append(open_from.pop())
                self.labels.append(node.label)
                continue
            # No node within is numbered yet: the next number is that of the leftmost leaf.
            open_from.append(len(self.labels))
            stack.append((node, True))
            stack += [(child, False) for child in reversed(node.children)]
        last = {first: number for number, first in enumerate(self.firsts)}
        self.roots = sorted(last.values())


def tree_distance(
    one: Tree[Label], other: Tree[Label], replacement: Callable[[Label, Label], float]
) -> float:
    """The least cost of insertions and deletions of nodes, 1 each, and replacements.

    Zhang and Shasha 1989: forests of the parts of both trees, from the leaves on.

    Args:
        one: a tree.
        other: what it is to become.
        replacement: cost of a label in the place of another.
    """
    left, right = _Order(one), _Order(other)
    found = [[0.0] * len(right.labels) for _ in left.labels]
    costs: dict[tuple[int, int], float] = {}

    def cost(i: int, j: int) -> float:
        if (i, j) not in costs:
            costs[i, j] = replacement(left.labels[i], right.labels[j])
        return costs[i, j]

    for i in left.roots:
        for j in right.roots:
            _forests(left, right, i, j, found, cost)
    return found[-1][-1]


def _forests(
    left: _Order[Label],
    right: _Order[Label],
    i: int,
    j: int,
    found: list[list[float]],
    cost: Callable[[int, int], float],
) -> None:
    """Fills in ``found`` the distances of the subtrees on the leftmost paths of nodes i and j."""
    a, b = left.firsts[i], right.firsts[j]
    above = [float(column) for column in range(j - b + 2)]
    table = [above]
    for m in range(a, i + 1):
        row = [above[0] + 1]
        for n in range(b, j + 1):
            least = min(above[n - b + 1], row[-1]) + 1
            if left.firsts[m] == a and right.firsts[n] == b:
                least = min(least, above[n - b] + cost(m, n))
                found[m][n] = least
            else:
                before = table[left.firsts[m] - a][right.firsts[n] - b]
                least = min(least, before + found[m][n])
            row.append(least)
        table.append(row)
        above = row
