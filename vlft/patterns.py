"""How long regular expressions may take to match a name: bounded before they are used.

Python's matching has no time limit, and goes back as often as an expression gives it a choice:
``(a|a)(a|a)...`` or ``.?.?...`` take as long as ``(a+)+``. The bound counts the ways of matching:

    a, ., [ab]    1         xy      ways of x * ways of y     .*       where it ends; of k of them
    x|y           the sum   x{0,3}  ways of x cubed * 4                the binomial of n + k over k
"""

from __future__ import annotations

import re
from math import comb
from re import _parser as parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

# Characters of the longest name of a module.
LONGEST_NAME = 100
# Ways of matching a name with all expressions together, which take a few milliseconds.
MOST_WAYS = 200_000
# The size of Python's cache of compiled expressions; beyond it each match compiles anew.
MOST_PATTERNS = 500
# A repetition of a character with more choices of its length counts as ``.*``.
FEW_LENGTHS = 8


class _Ways(NamedTuple):
    """Upper bounds of how often parts of an expression are tried.

    Attributes:
        ways: of matching, but for the ends of long repetitions.
        stars: long repetitions of a character.
        aside: steps of looking ahead and back, which leave no choice behind.
    """

    ways: float = 1
    stars: int = 0
    aside: float = 0

    @property
    def ends(self) -> float:
        """Ways of matching."""
        return self.ways * float(comb(LONGEST_NAME + self.stars, self.stars))


def are_quick(patterns: Iterable[str]) -> bool:
    """Whether these are regular expressions that match the name of any module at once."""
    found = list(patterns)
    try:
        for pattern in found:
            re.compile(pattern)
        ways = [_of(parser.parse(pattern)) for pattern in found]
        total = sum(one.ends + one.aside for one in ways)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(found) <= MOST_PATTERNS and total <= MOST_WAYS


def _of(items: Any) -> _Ways:
    """The bounds of a parsed expression."""
    found = _Ways()
    for kind, value in items:
        item = _of_item(str(kind), value)
        aside = found.aside + found.ends * item.aside
        found = _Ways(found.ways * item.ways, found.stars + item.stars, aside)
    return found


def _of_item(kind: str, value: Any) -> _Ways:
    if kind == "BRANCH":
        return _either(value[1])
    if kind == "GROUPREF_EXISTS":
        return _either(branch for branch in value[1:] if branch)
    if kind == "SUBPATTERN":
        return _of(value[-1])
    if kind in ("ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
        inner = _of(value if kind == "ATOMIC_GROUP" else value[1])
        return _Ways(aside=inner.ends + inner.aside)
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return _repeated(*value)
    return _Ways()


def _either(branches: Iterable[Any]) -> _Ways:
    found = [_of(branch) for branch in branches]
    stars, aside = max(one.stars for one in found), sum(one.aside for one in found)
    return _Ways(sum(one.ways for one in found), stars, aside)


def _repeated(least: Any, most: Any, items: Any) -> _Ways:
    inner = _of(items)
    # Beyond the end of the name there is nothing to choose.
    times = min(int(most), LONGEST_NAME)
    lengths = max(times - int(least), 0) + 1
    if inner == _Ways() and lengths > FEW_LENGTHS:
        return _Ways(stars=1)
    ways = inner.ends**times * lengths
    return _Ways(ways, aside=ways * inner.aside)
