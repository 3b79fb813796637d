"""The sources of the training data: what an epoch has of each, as a draw and as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from vlft import console
from vlft.data.mix import FLAG, sources_of
from vlft.errors import DataError, raise_all
from vlft.packing.draw import Draw, drawn_by_share, drawn_by_weight, quotas

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset

# In a run folder: the table as JSON.
MIX_FILE = "mix.json"
# Samples of a source whose tokens are counted; of a larger one the others are taken to be alike.
COUNTED = 400


def make_draw(config: SftConfig, train: Dataset) -> Draw | None:
    """Which samples each epoch has; None if it has each of them once."""
    weights = train.store.weights[train.rows]
    if config.mix is None:
        return None if (weights == 1).all() else drawn_by_weight(weights, config.seed)
    shares = [source.share or 0.0 for source in sources_of(config.dataset, config.mix)]
    return drawn_by_share(_members(config, train), shares, weights, config.seed)


def check_mix(config: SftConfig, train: Dataset) -> None:
    """Raises DataError if a source of ``--mix`` has no training sample, or an epoch none of it."""
    if config.mix is None:
        return
    sources, members = sources_of(config.dataset, config.mix), _members(config, train)
    raise_all(
        [
            DataError(
                "no training sample, and --mix wants some", place=source.name,
                hint="correct its records, or leave out the source and its number",
            )
            for source, part in zip(sources, members, strict=True) if not len(part)
        ]
    )  # fmt: skip
    counts = quotas([source.share or 0.0 for source in sources], len(train))
    raise_all(
        [
            DataError(
                f"{FLAG} {config.mix} gives an epoch of {len(train)} samples none of it",
                place=source.name, hint="raise its number, or leave it out",
            )
            for source, count in zip(sources, counts, strict=True) if not count
        ]
    )  # fmt: skip


def mix_rows(config: SftConfig, train: Dataset) -> list[dict[str, Any]]:
    """For each source what an epoch has of it, as JSON values; none if nothing is mixed.

    ``records`` and ``images`` are those that there are, ``samples`` those of an epoch, on average
    where records have weights, and ``tokens`` the tokens of these, image tokens included.
    """
    draw = make_draw(config, train)
    sources = sources_of(config.dataset, config.mix)
    if draw is None and len(sources) < 2:
        return []
    weights = train.store.weights[train.rows]
    rows: list[dict[str, Any]] = []
    owners, images = train.shown_images()
    for number, (source, part) in enumerate(zip(sources, _members(config, train), strict=True)):
        total = float(weights[part].sum())
        samples = round(total) if config.mix is None or draw is None else draw.sources[number].quota
        chosen = part[np.linspace(0, len(part) - 1, min(len(part), COUNTED)).astype(int)]
        lengths = np.array([train.outlines[int(index)].tokens for index in chosen])
        mean = np.average(lengths, weights=weights[chosen]) if len(part) else 0
        rows.append(
            {
                "source": source.name,
                "records": len(np.unique(train.store.positions[train.rows[part]])),
                "images": len(np.unique(images[np.isin(owners, part)])),
                "samples": samples,
                "tokens": round(float(mean) * samples),
                "tokens_estimated": len(chosen) < len(part),
            }
        )
    for name in ("samples", "tokens"):
        whole = sum(row[name] for row in rows) or 1
        for row in rows:
            row[f"share_of_{name}"] = round(row[name] / whole, 4)
    return rows


def show_mix(rows: list[dict[str, Any]]) -> None:
    """Prints the table of the sources."""
    if not rows:
        return
    table = Table(title="An epoch", title_justify="left", box=None, pad_edge=False)
    names = ("source", "records", "images", "samples", "share", "tokens", "of tokens")
    for name in names:
        table.add_column(name, justify="left" if name == "source" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row["source"],
            *(f"{row[name]:,}" for name in ("records", "images", "samples")),
            f"{row['share_of_samples']:.1%}",
            f"{'about ' if row['tokens_estimated'] else ''}{row['tokens']:,}",
            f"{row['share_of_tokens']:.1%}",
        )
    console.err.print(table)


def write_mix(run: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the table of the sources into a run folder, if there is one."""
    if rows:
        (run / MIX_FILE).write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def _members(config: SftConfig, train: Dataset) -> list[Any]:
    """For each source the indices of its training samples."""
    files = train.store.positions[train.rows] >> 32
    return [
        np.flatnonzero((files >= source.first) & (files < source.first + len(source.files)))
        for source in sources_of(config.dataset, config.mix)
    ]
