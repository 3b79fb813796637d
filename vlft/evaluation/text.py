"""Metrics that compare two texts word by word: equal, contained, F1 of the tokens in common."""

from __future__ import annotations

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(reply: str, reference: str) -> float:
    """1 if both texts are equal, else 0; white space around them does not count.

    Case, punctuation and white space within count: a model that is tuned to a form is to keep it.
    """
    return float(reply.strip() == reference.strip())


def contains(reply: str, reference: str) -> float:
    """1 if the reply contains the reference, else 0; case and runs of white space do not count.

    For chatty replies to short references. A reference 1 is contained in a reply 10.
    """
    return float(_folded(reference) in _folded(reply))


def token_f1(reply: str, reference: str) -> float:
    """F1 of the words in common, 0 to 1, as SQuAD (Rajpurkar et al. 2016) computes it.

    Lower case, without ASCII punctuation and English articles, split at white space; a word counts
    as often as both have it. If one has no words left, 1 if both have none (SQuAD 2.0). For
    languages without spaces between words use cer.
    """
    found, wanted = _words(reply), _words(reference)
    if not found or not wanted:
        return float(found == wanted and bool(reply.strip()))
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()
