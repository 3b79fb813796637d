"""The report of an evaluation: its figures, and the records that tuning changed most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.evaluation.report import ROLES, lines_of
from vlft.files import read_object_if_there
from vlft.report.gallery import Card, drawing_of, gallery, images_of
from vlft.report.page import section, table, text, write_page
from vlft.schema import ANY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.evaluation.scores import Scores

# Records that are shown.
CARDS = 48


def report_path(path: Path) -> Path:
    """The report of a result file, beside it."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".report.html")


def write_eval_report(
    scores: Sequence[Scores],
    positions: Sequence[Sequence[int]],
    summary: Mapping[str, Any],
    target: Path,
) -> None:
    """Writes the report of one result file or of two, the base first.

    Args:
        scores: of each file.
        positions: see ``evaluation.report.summarise``.
        summary: what that function returned.
        target: the file.
    """
    figures = f'<div class="scroll"><pre>{text(chr(10).join(lines_of(summary)))}</pre></div>'
    settings = [
        section(f"Settings of {one.of.path.name}", _settings(one.of.path), folded=True)
        for one in scores
    ]
    shown = "Records that tuning changed most" if len(scores) > 1 else "Records"
    body = [figures, section(shown, gallery(_cards(scores, positions, summary))), *settings]
    write_page(target, f"Evaluation of {scores[-1].of.path.name}", body)


def _settings(path: Path) -> str:
    header = read_object_if_there(
        path.with_name(path.name.removesuffix(".jsonl") + ".settings.json"), ANY
    )
    values = {key: header[key] for key in ("model", "checkpoint", "dataset") if key in header}
    stated = header.get("settings")
    values |= stated if isinstance(stated, dict) else {}
    return table(("setting", "value"), list(values.items())) if values else ""


def _cards(
    scores: Sequence[Scores], positions: Sequence[Sequence[int]], summary: Mapping[str, Any]
) -> list[Card]:
    """Those of two files by the difference of their first score, of one with the worst first."""
    name = next(iter(scores[0].values))
    first, last = scores[0].values[name][list(positions[0])], scores[-1].values[name]
    # One file's worst come first.
    keys = first if summary["metrics"][name]["higher_is_better"] else -first
    if len(scores) > 1:
        keys = -abs(last[list(positions[1])] - first)
    order = sorted(range(len(positions[0])), key=lambda place: (float(keys[place]), place))
    return [_card(scores, [found[place] for found in positions]) for place in order[:CARDS]]


def _card(scores: Sequence[Scores], places: Sequence[int]) -> Card:
    answers = [one.of.answers[place] for one, place in zip(scores, places, strict=True)]
    roles = ROLES if len(scores) > 1 else ("reply",)
    replies = list(zip(roles, answers, strict=True))
    drawn = {role: drawing_of(answer.fields, answer.reply) for role, answer in replies}
    texts = [
        ("prompt", str(answers[-1].fields.get("query", ""))),
        ("label", "\n".join(answers[-1].references)),
        *((role, answer.reply) for role, answer in replies if drawn[role] is None),
    ]
    drawings = [(role, path) for role, path in drawn.items() if path is not None]
    target = answers[-1].fields.get("label")
    if drawings and isinstance(target, str):
        # The image that the record has, see ``vlft draw``.
        drawings = [("target", Path(target)), *drawings]
    words = [
        f"{name} " + " -> ".join(
            f"{one.metrics[name].final(one.values[name][place]):.2f}"
            for one, place in zip(scores, places, strict=True)
        )
        for name in scores[0].values
    ]  # fmt: skip
    images, boxed = images_of(answers[-1].fields), answers[-1].reply
    return Card(images, texts, ", ".join(words), boxed, drawings)
