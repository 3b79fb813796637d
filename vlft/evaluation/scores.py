"""Scores of answers, record by record, and the file that keeps them.

answers.scores.jsonl    a line per scored record: result_line, id, query, reply, references, then a
                        column for each metric (exact_match, cer, ...) and each weight (cer_weight)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.errors import CheckpointError, DataError, raise_all, shown
from vlft.files import json_text, open_regular, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from vlft.evaluation.answers import Answer, Answers
    from vlft.evaluation.metrics import Metric
    from vlft.evaluation.statistics import Floats

# The start of every line, by which a file of ours is known.
START = b'{"result_line": '


@dataclass(frozen=True)
class Scores:
    """What the answers of a result file scored.

    Attributes:
        of: the answers, N.
        metrics: by name.
        values: (N,) of each metric.
        weights: (N,) of each metric, in the mean over records.
    """

    of: Answers
    metrics: Mapping[str, Metric]
    values: dict[str, Floats]
    weights: dict[str, Floats]


def score(answers: Answers, metrics: Mapping[str, Metric]) -> Scores:
    """Scores all answers of a file by these metrics.

    Raises:
        DataError: references that a metric cannot use.
    """
    values, weights = {}, {}
    problems: list[DataError] = []
    for name, metric in metrics.items():
        table = np.empty((len(answers.answers), 2))
        score_of = metric.scorer([answer.references for answer in answers.answers])
        for index, answer in enumerate(answers.answers):
            try:
                table[index] = (
                    metric.of_fields(answer.fields)
                    if metric.of_fields
                    else score_of(answer.reply, answer.references)
                )
            except ValueError as error:
                place = f"{shown(answers.path)}:{answer.line}"
                hint = "name a metric that fits the data, or other --references"
                problems.append(DataError(f"the reference {error}", place=place, hint=hint))
        values[name], weights[name] = table.T.copy()
    raise_all(problems)
    return Scores(answers, metrics, values, weights)


def scores_path(path: Path) -> Path:
    """The file for the scores of a result file, beside it."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".scores.jsonl")


def check_own(path: Path) -> None:
    """Raises CheckpointError if there is something that vlft has not written."""
    if not path.exists() and not path.is_symlink():
        return
    is_ours = path.is_file() and not path.is_symlink()
    if is_ours:
        with open_regular(path) as file:
            start = file.read(len(START))
        is_ours = start in (START, b"")
    if not is_ours:
        hint = "move it away: the scores of the result file beside it are written there"
        raise CheckpointError("vlft has not written this", place=shown(path), hint=hint)


def write_scores(scores: Scores, path: Path) -> None:
    """Writes a line per record, in place of an older file as a whole."""
    write_whole(path, "".join(json_text(row) + "\n" for row in _rows(scores)))


def _rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """The lines: a column has one type, so that table readers can load them."""
    has_ids = any(answer.fields.get("id") for answer in scores.of.answers)
    for index, answer in enumerate(scores.of.answers):
        row = {"result_line": answer.line, **_named(answer, has_ids)}
        for name, values in scores.values.items():
            column = name.replace("-", "_")
            row[column] = float(scores.metrics[name].final(values[index]))
            if scores.metrics[name].weight:
                row[f"{column}_weight"] = float(scores.weights[name][index])
        yield row


def _named(answer: Answer, has_ids: bool) -> dict[str, Any]:
    """What the record is, as text."""
    found = answer.fields.get("id")
    name = {"id": "" if found is None else str(found)} if has_ids else {}
    query = answer.fields.get("query")
    query = query if isinstance(query, str) else ""
    reply = {"query": query, "reply": answer.reply, "references": list(answer.references)}
    return {**name, **reply}
