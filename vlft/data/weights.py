"""``weight`` of a record: how often an epoch has it."""

from __future__ import annotations

import math
from typing import Any

from vlft.errors import DataError

WEIGHT = "weight"
# An epoch of a million records of this weight has a hundred million samples.
LARGEST = 100


def weight_of(value: Any) -> float:
    """The weight that a record states as a number; 1 for none.

    Raises:
        DataError: it is no number from 0 to ``LARGEST``.
    """
    if value is None or value == "":
        return 1.0
    number = math.nan
    # A cell of CSV is text.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if 0 <= number <= LARGEST:
        return number
    raise DataError(
        f'"{WEIGHT}" is {value!r:.50}; numbers from 0 to {LARGEST} are allowed',
        hint="it says how often an epoch has the record; a column that means something else "
        "needs another name",
    )
