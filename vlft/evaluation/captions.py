"""CIDEr: captions by the n-grams that they share with references and that few images have."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Ngram: TypeAlias = tuple[str, ...]

LONGEST = 4
# Of the Gaussian of the difference in length, in words.
SIGMA = 6.0
SCALE = 10.0
# Words of PTB's tokenizer without its punctuation: "it's" is it 's, "don't" is do n't; brackets and
# other signs are words.
WORD = re.compile(
    r"n['’]t\b|['’](?:s|m|d|re|ve|ll)\b|\w+?(?=n['’]t\b)|\w+(?:[-.]\w+)*|[^\w\s.,:;?!'’\"`-]"
)


class _Vector:
    """The n-grams of a caption by their weights, term frequency by inverse document frequency."""

    def __init__(self, words: Sequence[str], frequencies: Counter[Ngram], records: int) -> None:
        self.length = len(words)
        self.weights: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
        for ngram, times in _ngrams(words).items():
            rarity = math.log(records) - math.log(max(1, frequencies[ngram]))
            self.weights[len(ngram) - 1][ngram] = times * rarity
        self.norms = [math.sqrt(sum(w * w for w in one.values())) for one in self.weights]

    def similarity(self, other: _Vector) -> float:
        """The mean over n of the clipped cosines, less for another length; other is a reference."""
        total = 0.0
        for mine, theirs, norm, other_norm in zip(
            self.weights, other.weights, self.norms, other.norms, strict=True
        ):
            shared = sum(min(w, theirs[n]) * theirs[n] for n, w in mine.items() if n in theirs)
            total += shared / (norm * other_norm) if norm and other_norm else 0.0
        # The number of bigrams, as in the reference: of one word less than the caption has.
        difference = max(self.length - 1, 0) - max(other.length - 1, 0)
        return total / LONGEST * math.exp(-(difference**2) / (2 * SIGMA**2))


def cider(corpus: Sequence[Sequence[str]]) -> Callable[[str, Sequence[str]], float]:
    """CIDEr-D of a reply with all references of its record, 0 to 10 (Vedantam et al. 2015).

    As pycocoevalcap's ``Cider``, by the words of PTB's tokenizer in lower case without punctuation.
    Papers write it times 100. What is rare is known from all references of the data: with a single
    record all scores are 0.

    Args:
        corpus: the references of each record.

    Returns:
        The score of a reply and its references.
    """
    frequencies: Counter[Ngram] = Counter()
    for references in corpus:
        frequencies.update({ngram for text in references for ngram in _ngrams(_words(text))})

    def score(reply: str, references: Sequence[str]) -> float:
        found, *wanted = (
            _Vector(_words(text), frequencies, len(corpus)) for text in (reply, *references)
        )
        return SCALE * sum(map(found.similarity, wanted)) / len(wanted)

    return score


def _ngrams(words: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(words[first : first + size])
        for size in range(1, LONGEST + 1)
        for first in range(len(words) - size + 1)
    )


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
