"""Answers that are numbers, as in questions about charts."""

from __future__ import annotations

import math

TOLERANCE = 0.05


def relaxed_accuracy(reply: str, reference: str) -> float:
    """1 if a number is within 5 % of the reference or a text equals it without case, else 0.

    Masry et al. 2022 (ChartQA, section 5.1), as pix2struct's ``relaxed_correctness``: 12% is 0.12,
    numbers have no thousands separators, and a reference of 0 is compared as text. White space
    around the texts does not count.
    """
    found, wanted = _number(reply), _number(reference)
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= TOLERANCE)
    return float(reply.strip().lower() == reference.strip().lower())


def _number(text: str) -> float | None:
    """The finite number that a text is, None for another text."""
    text = text.strip()
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
