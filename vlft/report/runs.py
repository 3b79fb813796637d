"""The report of a run, and of several runs beside each other."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.checkpoints.runs import PROVENANCE, RUN_CONFIG, read_provenance, read_run_config
from vlft.config import SftConfig
from vlft.errors import CheckpointError, raise_all, shown
from vlft.evaluation.kept_answers import by_change, read_answers_at
from vlft.evaluation.own import name_of
from vlft.report.charts import Curve, chart
from vlft.report.gallery import Card, card_of, gallery, images_of
from vlft.report.page import NAME, check_own_page, section, table, write_page
from vlft.settings import check, flag
from vlft.training.plots import METRICS, RATES, read_curves

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.config import ReportConfig
    from vlft.training.plots import Points

# Replies of a run that are shown.
REPLIES = 12
SCORE = "score of validation answers"
PLAIN = {"learning_rate": "learning rate", "grad_norm": "gradient norm before clipping", **RATES}


@dataclass(frozen=True)
class _Run:
    """What a run folder says of the run."""

    path: Path
    settings: Mapping[str, Any]
    origin: Mapping[str, Any]
    curves: Mapping[str, Points]

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def metric(self) -> str:
        """The name of the metric that scores answers."""
        return name_of(self.settings["eval_metric"] or "")

    @property
    def best_score(self) -> tuple[float, float] | None:
        """Step and value of the best score of answers."""
        return next(iter(self.curves["best_score"]), None)

    @property
    def best(self) -> tuple[float, float] | None:
        """Step and value of the least validation loss."""
        return next(iter(self.curves["best"]), None)


@dataclass(frozen=True)
class ReportResult:
    """The report that was written."""

    path: Path


def run_report(config: ReportConfig) -> ReportResult:
    """Writes the report of one run, or one that compares several.

    Raises:
        VlftError: a folder is no run, or something else stands in the report's place.
    """
    config = check(config)
    folders = [Path(folder) for folder in config.runs]
    raise_all([_no_run(folder) for folder in folders if not (folder / RUN_CONFIG).is_file()])
    target = config.output or (folders[0] if len(folders) == 1 else Path()) / NAME
    check_own_page(target)
    if len(folders) == 1:
        write_run_report(folders[0], target)
    else:
        runs = [_read(folder) for folder in folders]
        title = f"{len(runs)} runs"
        write_page(target, title, [_summary(runs), _charts(runs), _differences(runs)])
    console.info(f"report: {shown(target)}")
    return ReportResult(target)


def write_run_report(folder: Path, target: Path | None = None) -> None:
    """Writes the report of a run, into its folder unless a target is named."""
    run = _read(folder)
    changed = _chosen(run.settings)
    sections = [
        _summary([run]),
        section("Curves", _charts([run])),
        section("Settings that are not the default", table(("setting", "value"), changed)),
        section("Data", _data(run)),
        section("Answers that tuning changed most", gallery(_answers(run))),
        section("Replies", gallery(_replies(folder))),
        section("All settings", table(("setting", "value"), _rows(run.settings)), folded=True),
        section("Made with", table(("", ""), _rows(run.origin)), folded=True),
    ]
    write_page(target or folder / NAME, f"Run {run.name}", sections)


def _no_run(folder: Path) -> CheckpointError:
    hint = "name run folders of vlft sft, output/MODEL/vN-..."
    return CheckpointError(f"no {RUN_CONFIG} there", place=shown(folder), hint=hint)


def _read(folder: Path) -> _Run:
    folder = folder.absolute()
    origin = read_provenance(folder) if (folder / PROVENANCE).is_file() else {}
    settings = asdict(read_run_config(folder))
    return _Run(folder, settings, origin, read_curves(folder / METRICS))


def _summary(runs: Sequence[_Run]) -> str:
    """A row for each run."""
    heads = ["run", "model", "started", "steps", "last training loss", "best validation loss"]
    scored = any(run.best_score for run in runs)
    heads += ["best score"] if scored else []
    rows = []
    for run in runs:
        last = run.curves["loss"][-1] if run.curves["loss"] else None
        best = f"{run.best[1]:.4f} at step {run.best[0]:,.0f}" if run.best else "none"
        steps, loss = (f"{last[0]:,.0f}", f"{last[1]:.4f}") if last else ("0", "none")
        model = run.settings["model"] or "the sample's"
        row = [run.name, model, run.origin.get("started", ""), steps, loss, best]
        if scored:
            step, score = run.best_score or (0, 0)
            found = f"{run.metric} {score:.4f} at step {step:,.0f}"
            row.append(found if run.best_score else "none")
        rows.append(row)
    return table(heads, rows)


def _charts(runs: Sequence[_Run]) -> str:
    """Loss, learning rate, gradient norm, speed and memory; of several runs one curve for each."""
    if len(runs) > 1:
        titles = {
            "val_loss": "validation loss", "val_score": SCORE,
            "smoothed": "training loss, smoothed", **PLAIN,
        }  # fmt: skip
        figures = [
            chart(title, [Curve(run.name, run.curves[key], n) for n, run in enumerate(runs)])
            for key, title in titles.items()
        ]
        return f'<div class="charts">{"".join(figures)}</div>'
    run = runs[0]
    losses = [
        Curve("", run.curves["loss"], 0, faint=True),
        Curve("training, smoothed", run.curves["smoothed"], 0),
        Curve("validation", run.curves["val_loss"], 1),
    ]
    figures = [chart("loss, nats per token", losses, run.best)]
    figures.append(chart(SCORE, [Curve("", run.curves["val_score"], 1)], run.best_score))
    figures += [chart(title, [Curve("", run.curves[key])]) for key, title in PLAIN.items()]
    return f'<div class="charts">{"".join(figures)}</div>'


def _differences(runs: Sequence[_Run]) -> str:
    """The settings that are not the same in all runs."""
    rows = [
        (flag(key), *(_value(run.settings[key]) for run in runs))
        for key in runs[0].settings
        if any(run.settings[key] != runs[0].settings[key] for run in runs)
    ]
    heads = ("setting", *(run.name for run in runs))
    return section("Settings that differ", table(heads, rows) if rows else "<p>none</p>")


def _chosen(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    defaults = asdict(SftConfig())
    return _rows({key: value for key, value in settings.items() if value != defaults.get(key)})


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", "-"), _value(value)) for key, value in values.items()]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _data(run: _Run) -> str:
    """The data files, by their digests, and the shares of a mix."""
    files = [(path, digest[:16]) for path, digest in run.origin.get("data", {}).items()]
    made = table(("file", "SHA-256"), files) if files else ""
    with suppress(OSError, ValueError):
        rows = json.loads((run.path / "mix.json").read_text("utf-8"))
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            made += table(list(rows[0]), [list(map(_value, row.values())) for row in rows])
    return made


def _answers(run: _Run) -> list[Card]:
    """Base and tuned answers to validation records, if the run has had some answered."""
    best = run.best_score or (0, 0)
    pairs = by_change(read_answers_at(run.path, 0), read_answers_at(run.path, int(best[0])))
    return [
        Card(
            images_of(tuned),
            [
                ("prompt", str(tuned.get("query", ""))), ("label", str(tuned.get("label", ""))),
                ("base", base["response"]), ("tuned", tuned["response"]),
            ],
            f"{run.metric} {base['score']:.2f} -> {tuned['score']:.2f}",
            tuned["response"],
        )
        for base, tuned in pairs[:REPLIES]
    ] if best[0] else []  # fmt: skip


def _replies(folder: Path) -> list[Card]:
    """The first lines of the newest result file in the run folder."""
    files = [
        path
        for path in (folder / "infer").glob("*.jsonl")
        if not path.name.endswith(".scores.jsonl") and path.is_file()
    ]
    cards = []
    if files:
        newest = max(files, key=lambda path: path.stat().st_mtime)
        with newest.open("rb") as file:
            for line, _ in zip(file, range(REPLIES), strict=False):
                with suppress(ValueError, RecursionError):
                    cards += card_of(json.loads(line))
    return cards
