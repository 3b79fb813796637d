"""Records that are skipped, with the reasons: one line on the screen, all of them in a file."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.errors import UsageError

# Most reasons that the line counts.
REASONS_SHOWN = 5


def as_row(error: UsageError) -> dict[str, str]:
    """A skipped record for a file: its place and why it was skipped."""
    return {"record": error.place, "reason": error.message}


def in_one_line(problems: Sequence[UsageError]) -> str:
    """How many records are skipped, for which reasons, and the first of them."""
    first = f"{problems[0].place}: {problems[0].message}"
    if len(problems) == 1:
        return f"skipped 1 bad record: {first}"
    # Without numbers and details the reasons of many records are the same.
    reasons = Counter(re.sub(r"(:| \().*|\d+ ", "", problem.message) for problem in problems)
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(REASONS_SHOWN))
    more = ", ..." if len(reasons) > REASONS_SHOWN else ""
    return f"skipped {len(problems)} bad records ({counts}{more}), the first: {first}"
