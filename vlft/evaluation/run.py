"""``vlft eval``: scores of a model's answers or of result files, and of two the difference."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.config import InferConfig
from vlft.errors import ConfigError, shown
from vlft.evaluation.answers import by_checkpoint, pair, read_answers
from vlft.evaluation.own import find_metrics
from vlft.evaluation.report import lines_of, summarise
from vlft.evaluation.scores import check_own, score, scores_path, write_scores
from vlft.files import same_file
from vlft.report.evaluations import report_path, write_eval_report
from vlft.report.page import check_own_page
from vlft.settings import check, given_names

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlft.config import EvalConfig
    from vlft.evaluation.answers import Answers


@dataclass(frozen=True)
class EvalResult:
    """The summary of an evaluation, as --json prints it, and the files of scores per record."""

    summary: dict[str, Any]
    scores: list[Path]


def run_eval(config: EvalConfig) -> EvalResult:
    """Scores the answers of result files, or of a model that answers records first.

    Raises:
        VlftError: bad input.
    """
    config = check(config)
    files = list(config.results)
    # Before a model answers, which may take hours.
    metrics = find_metrics(config.metric)
    for path in files:
        _read(path, config)
    if config.answers_data:
        files.append(_answer(config))
    if len(files) > 1 and same_file(*files):
        hint = "give the answers of two models"
        raise ConfigError(f"{shown(files[0])} twice", place="--results", hint=hint)
    answers = [one for path in files for one in _read(path, config)]
    if len(answers) > 2:
        found = f"found {len(answers)} sets of answers, one or two are allowed"
        raise ConfigError(found, place="--results", hint="compare two checkpoints at a time")
    scores = [score(one, metrics) for one in answers]
    positions: Sequence[Sequence[int]] = [range(len(scores[0].of.answers))]
    if len(scores) > 1:
        positions = pair(scores[0].of, scores[1].of)
    summary = summarise(scores, positions, config.seed)
    for one in scores:
        write_scores(one, scores_path(one.of.path))
    report = report_path(scores[-1].of.path)
    write_eval_report(scores, positions, summary, report)
    if config.json:
        console.out.print(json.dumps(summary, indent=1), markup=False)
    else:
        for line in lines_of(summary):
            console.out.print(line, markup=False)
        console.info(f"report: {shown(report)}")
    return EvalResult(summary, [scores_path(one.of.path) for one in scores])


def _read(path: Path, config: EvalConfig) -> list[Answers]:
    """The answers in a file, by checkpoint, and a check of what is beside it.

    Raises:
        VlftError: they cannot be scored, or vlft has not written what is there.
    """
    found = by_checkpoint(read_answers(path, config.references))
    for one in found:
        check_own(scores_path(one.path))
        check_own_page(report_path(one.path))
    return found


def _answer(config: EvalConfig) -> Path:
    """The result file of the model's answers, which ``vlft infer`` would write or continue."""
    # Result files alone are scored without waiting for torch.
    from vlft.inference.run import run_infer

    names = {field.name for field in fields(InferConfig)}
    chosen = {name: getattr(config, name) for name in given_names(config) if name in names}
    if config.json:
        chosen["show_samples"] = 0
    if "perplexity" in config.metric:
        chosen["label_loss"] = True
    result = run_infer(InferConfig(**chosen))
    if result is None:
        raise ConfigError("found no data set", place="vlft eval", hint="add --dataset")
    return result.output
