"""Edits that turn one text into the other, in characters and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

# An answer of which half or more is wrong counts as wrong (Biten et al. 2019, section 4).
ANLS_THRESHOLD = 0.5


def cer(reply: str, reference: str) -> float:
    """Character error rate: edits by characters of the reference, from 0; above 1 for long replies.

    White space around the texts does not count; as ``jiwer.cer``. Over records, edits are divided
    by all characters, not averaged record by record.
    """
    return edit_distance(reply.strip(), reference.strip()) / characters(reference)


def wer(reply: str, reference: str) -> float:
    """Word error rate: edits by words of the reference, from 0; above 1 for long replies.

    Words stand between white space; as ``jiwer.wer``. Over records, edits are divided by all words.
    """
    return edit_distance(reply.split(), reference.split()) / words(reference)


def anls(reply: str, reference: str) -> float:
    """ANLS: 1 less the share of edited characters, or 0 below 0.5 (Biten et al. 2019, ST-VQA).

    1 - edits / characters of the longer text; 0 if that is below 0.5. Case and runs of white space
    do not count.
    """
    found, wanted = (" ".join(text.lower().split()) for text in (reply, reference))
    longest = max(len(found), len(wanted))
    similarity = 1 - edit_distance(found, wanted) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def characters(reference: str) -> int:
    """The number of characters that count in the error rate; at least 1."""
    return max(len(reference.strip()), 1)


def words(reference: str) -> int:
    """The number of words that count in the error rate; at least 1."""
    return max(len(reference.split()), 1)


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements.

    The columns of the table are bits of whole numbers (Myers 1999, in the form of Hyyrö 2003), so
    that two pages of 5,000 characters take milliseconds.
    """
    if not one:
        return len(other)
    places: dict[Hashable, int] = {}
    for index, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << index
    mask, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    # Rows where the value is one more, or one less, than in the row above.
    more, less, distance = mask, 0, len(one)
    for item in other:
        equal = places.get(item, 0)
        diagonal = ((((equal & more) + more) ^ more) | equal | less) & mask
        right = (less | ~(diagonal | more)) & mask
        left = more & diagonal
        distance += bool(right & last) - bool(left & last)
        right = (right << 1 | 1) & mask
        more = ((left << 1) | ~(diagonal | right)) & mask
        less = right & diagonal
    return distance
