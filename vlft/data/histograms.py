"""How turns, images, sizes, replies and tokens are distributed over the data."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.console import tracked
from vlft.data.conversation import flat_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vlft.data.source import ReadFile

# Rows of a histogram of single values; of more values, ranges are counted.
MOST_ROWS = 8
# Columns of the longest bar: with title, label and count a row has at most 80.
LONGEST_BAR = 40
# A reply is named if it has this many times the median's characters, and at least so many.
EXTREME, LONG = 20, 500
EXAMPLES = 5


def histograms(files: Sequence[ReadFile], tokens: Sequence[int]) -> dict[str, dict[str, int]]:
    """Histograms of all files together: value or range -> count, ascending.

    Args:
        files: the data files.
        tokens: (S,) lengths of all samples; empty if they are not known.
    """
    turns: Counter[int] = Counter()
    images: Counter[int] = Counter()
    sides = {}
    for file in files:
        columns = file.items.columns
        turns.update(map(abs, columns.turns))
        images.update(np.diff(np.asarray(columns.ends, np.int64), prepend=0).tolist())
        for number in np.unique(np.asarray(columns.images, np.int32)).tolist():
            sides[file.items.paths[number]] = max(file.items.facts(number).size)
    found = {
        "turns": turns,
        "images_per_sample": images,
        "longer_side_of_images": Counter(sides.values()),
        "tokens": Counter(tokens),
    }
    return {name: grouped(counts) for name, counts in found.items() if counts}


def grouped(counts: Mapping[int, int]) -> dict[str, int]:
    """Counts by value; by ranges that end at powers of two if there are many values."""
    if len(counts) <= MOST_ROWS:
        return {str(value): counts[value] for value in sorted(counts)}
    made: Counter[int] = Counter()
    for value, count in counts.items():
        made[max(value - 1, 0).bit_length()] += count
    return {
        f"{2 ** (power - 1) + 1 if power else 0}-{2**power}": made[power] for power in sorted(made)
    }


def lines_of_histograms(found: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The histograms as rows of bars, at most 80 columns wide."""
    for name, counts in found.items():
        most, total = max(counts.values()), sum(counts.values())
        yield f"{name.replace('_', ' ')}:"
        for label, count in counts.items():
            bar = "#" * max(1, round(LONGEST_BAR * count / most))
            yield f"  {label:>13} {bar:<{LONGEST_BAR}} {count:,} ({count / total:.0%})"


def replies(files: Sequence[ReadFile]) -> dict[str, Any]:
    """Lengths of the trained replies in characters, as JSON values; none without replies."""
    lengths: list[int] = []
    longest: list[tuple[int, int, str]] = []
    for file in files:
        items = file.items
        for index in tracked(range(len(items)), "reading replies", len(items)):
            item = items.given(index)
            for turn in (item.without_reply() if item.drawn else item).turns:
                if turn.role == "assistant" and turn.is_trained:
                    lengths.append(len(flat_text(turn, "")))
                    entry = (lengths[-1], -len(lengths), item.place)
                    push = heapq.heappush if len(longest) < EXAMPLES else heapq.heappushpop
                    push(longest, entry)
    if not lengths:
        return {}
    values = np.array(lengths)
    median = int(np.sort(values)[len(values) // 2])
    bound = max(EXTREME * median, LONG)
    return {
        "count": len(values),
        "shortest": int(values.min()),
        "median": median,
        "longest": int(values.max()),
        "extreme": int((values >= bound).sum()),
        "extreme_examples": [
            {"sample": place, "characters": length}
            for length, _, place in sorted(longest, reverse=True)
            if length >= bound
        ],
    }


def lines_of_replies(found: Mapping[str, Any]) -> Iterator[str]:
    """The lengths of the replies for people."""
    if not found:
        return
    lengths = ", ".join(f"{name} {found[name]:,}" for name in ("shortest", "median", "longest"))
    yield f"characters of the replies: {lengths}"
    if found["extreme"]:
        first = found["extreme_examples"][0]
        what = "1 reply is" if found["extreme"] == 1 else f"{found['extreme']} replies are"
        yield (
            f"{what} {EXTREME} times as long as the median or longer "
            f"(the longest: {first['sample']}, {first['characters']:,} characters)"
        )
