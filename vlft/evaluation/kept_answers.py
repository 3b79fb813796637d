"""The answers that a run has given to validation records: ``answers/step-<N>.jsonl``.

Kept are those of the untrained model, of the best checkpoint and of the last evaluation. They are
result files: ``vlft eval --results RUN/answers/step-0.jsonl RUN/answers/step-300.jsonl`` compares
two of them.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from vlft.data.layouts.place import COMMON_TAG
from vlft.errors import CheckpointError, printable, shown
from vlft.files import json_text, write_whole

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    Row = Mapping[str, Any]

FOLDER = "answers"
_FILE = re.compile(r"step-(\d+)\.jsonl")
# Records in the table at the end of a run, and the widths of its columns.
SHOWN = 5


def write_answers(run: Path, step: int, rows: Sequence[Row], others: Collection[int]) -> None:
    """Writes the answers at a step; of earlier ones those at ``others`` stay.

    Raises:
        CheckpointError: the folder is a link, which may lead out of the run.
    """
    folder = run / FOLDER
    if folder.is_symlink():
        hint = "remove it: files in that folder are written and removed"
        raise CheckpointError("a link", place=shown(folder), hint=hint)
    folder.mkdir(exist_ok=True)
    write_whole(folder / f"step-{step}.jsonl", "".join(json_text(row) + "\n" for row in rows))
    for path in folder.iterdir():
        found = _FILE.fullmatch(path.name)
        if found and int(found[1]) not in {step, *others} and not path.is_symlink():
            path.unlink()


def read_answers_at(run: Path, step: int | None) -> list[dict[str, Any]]:
    """The answers at a step; empty if there are none."""
    with suppress(OSError, ValueError, RecursionError):
        lines = (run / FOLDER / f"step-{step}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        if all(map(_is_row, rows)):
            return rows
    return []


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("response"), str)
        and isinstance(row.get("score"), int | float)
    )


def by_change(base: Sequence[Row], tuned: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Both answers to each record, those first whose score has changed most."""
    pairs = list(zip(base, tuned, strict=False))
    return sorted(pairs, key=lambda pair: -abs(pair[1]["score"] - pair[0]["score"]))


def answers_table(pairs: Sequence[tuple[Row, Row]], metric: str) -> Table:
    """A table of the first pairs, 80 columns wide: prompt, label, both answers, both scores."""
    table = Table(box=None, pad_edge=False, width=80, show_edge=False)
    for name, ratio in (("prompt", 5), ("label", 4), ("base", 4), ("tuned", 4)):
        table.add_column(name, ratio=ratio, no_wrap=True, overflow="ellipsis")
    table.add_column(metric[:16], justify="right", no_wrap=True)
    for base, tuned in pairs[:SHOWN]:
        texts = (tuned.get("query"), tuned.get("label"), base["response"], tuned["response"])
        # Where an image stands says less than the words behind it.
        words = [str(text or "").replace(COMMON_TAG, " ").split() for text in texts]
        cells = [Text(printable(" ".join(line))) for line in words]
        table.add_row(*cells, f"{base['score']:.2f} -> {tuned['score']:.2f}")
    return table
