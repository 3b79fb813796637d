"""``--eval-metric``: answers to validation records choose the best checkpoint."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
from typing import TYPE_CHECKING

import pytest
import subprocesses
import torch
from conftest import GOLDEN, SIGLIP, VL2_NOAUX, make_rows, only_siglip, write_jsonl
from launched import finish, launch
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import load_file

import vlft
from vlft.checkpoints.placement import Placement
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings
from vlft.distributed import World
from vlft.errors import CheckpointError, UsageError
from vlft.evaluation.judge import Verdict
from vlft.evaluation.kept_answers import (
    answers_table,
    by_change,
    read_answers_at,
    write_answers,
)
from vlft.inference.replier import Replier
from vlft.training import accelerator
from vlft.training.backend import Backend

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("step", "loss", "val_loss", "val_score", "val_best", "learning_rate", "grad_norm")


def settings(case, home: Path, **changes) -> vlft.SftConfig:
    """7 training samples, 3 for validation: 4 steps, an evaluation after each second one."""
    rows = make_rows(10, case)
    given = {
        "model": str(case.folder), **case.settings, "image_root": GOLDEN / "images",
        "dataset": (str(write_jsonl(home / "train.jsonl", rows[:7])),),
        "val_dataset": (str(write_jsonl(home / "val.jsonl", rows[7:])),),
        "output_dir": home / "output", "batch_size": 2, "num_train_epochs": 1, "save_steps": 2,
        "learning_rate": 1e-2, "lora_dropout": 0.1, "show_sample": False, "eval_metric": "cer",
    }  # fmt: skip
    return vlft.SftConfig(**given | changes)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(run / "last" / "state" / "state.safetensors")
    return state | load_file(run / "last" / "adapter_model.safetensors")


def assert_same(run: Path, other: Path) -> None:
    found, expected = adapter(run), adapter(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def metrics(run: Path, *names: str) -> list[list[float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[row.get(name) for name in names] for row in rows]


def answers(run: Path, step: int) -> list[dict]:
    lines = (run / "answers" / f"step-{step}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def judged(case, tmp_path_factory):
    """A run with a judge, and the same one without."""
    home = tmp_path_factory.mktemp("judged")
    one = vlft.sft(settings(case, home))
    plain = vlft.sft(settings(case, home, eval_metric=None))
    return one, plain


@pytest.mark.parametrize("case", [SIGLIP, VL2_NOAUX], indirect=True, ids=str, scope="module")
def test_it_does_not_disturb_the_run(judged):
    """Weights, moments, random numbers and losses are those of the run without it."""
    one, plain = judged
    assert_same(one.run, plain.run)
    names = ("step", "loss", "val_loss", "learning_rate", "grad_norm")
    assert metrics(one.run, *names) == metrics(plain.run, *names)
    scores = [score for (score,) in metrics(one.run, "val_score") if score is not None]
    assert len(scores) == 3
    assert one.best_score in scores[1:]
    assert plain.best_score is None


@only_siglip
class TestAnswers:
    def test_they_are_those_of_vlft_infer(self, judged, case, tmp_path):
        """Of the base, and of the checkpoint that was the last."""
        (one, _) = judged
        data = json.loads((one.run / "run_config.json").read_text())["val_dataset"]
        last = answers(one.run, one.step)
        for rows, of in (
            (answers(one.run, 0), {"model": str(case.folder)}),
            (last, {"ckpt_dir": one.checkpoint}),
        ):
            output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
            infer = vlft.InferConfig(
                **of, dataset=tuple(data), image_root=GOLDEN / "images", output=output,
                max_new_tokens=50, show_samples=0,
            )  # fmt: skip
            expected = vlft.infer(infer).rows
            # The judge ends replies earlier.
            for row, other in zip(rows, expected, strict=True):
                assert other["response"].startswith(row["response"].rstrip("\ufffd")) or (
                    row["finish"] == "length"
                )
                assert (row["query"], row["label"], row["images"]) == (
                    other["query"], other["label"], other["images"],
                )  # fmt: skip

    def test_two_of_the_files_can_be_compared(self, judged):
        (one, _) = judged
        files = tuple(one.run / "answers" / f"step-{n}.jsonl" for n in (0, one.step))
        summary = vlft.evaluate(vlft.EvalConfig(results=files, metric=("cer",))).summary
        means = [score["mean"] for score in summary["metrics"]["cer"]["scores"]]
        scores = [score for (score,) in metrics(one.run, "val_score") if score is not None]
        assert means == pytest.approx([scores[0], scores[-1]])

    def test_the_report_shows_both(self, judged):
        (one, _) = judged
        page = (one.run / "report.html").read_text("utf-8")
        for part in (
            "Answers that tuning changed most",
            "score of validation answers",
            "best score",
            "cer ",
        ):
            assert part in page


@only_siglip
class TestTheBest:
    def run(self, case, tmp_path, monkeypatch, scores, **changes):
        """A run whose evaluations score as given."""
        left = iter(scores)

        def verdict(self, _replies):
            return Verdict(self._name, next(left), self._metric.higher_is_better)

        monkeypatch.setattr("vlft.evaluation.judge.Judge._verdict", verdict)
        return vlft.sft(settings(case, tmp_path, save_steps=1, **changes))

    @pytest.mark.parametrize(("metric", "best"), [("exact-match", 1), ("cer", 3)])
    def test_the_metric_knows_what_is_better(
        self, case, tmp_path, monkeypatch, capfd, metric, best
    ):
        scores = [0.5, 0.6, 0.6, 0.2, 0.3]
        found = self.run(case, tmp_path, monkeypatch, scores, eval_metric=metric)
        assert (found.run / "best").resolve().name == f"checkpoint-{best}"
        assert found.best_score == scores[best]
        said = capfd.readouterr().err
        line = rf"step {best}: validation loss [\d.]+, {metric} {scores[best]:.4f} \(best\)"
        assert re.search(line, said)
        assert f"best: checkpoint-{best}, validation loss" in said
        assert f", {metric} 0.3000\n" in said

    def test_early_stopping_counts_by_it(self, case, tmp_path, monkeypatch, capfd):
        scores = [0.0, 0.6, 0.6, 0.5]
        found = self.run(
            case, tmp_path, monkeypatch, scores, eval_metric="exact-match", early_stop=2
        )
        assert found.step == 3
        assert "no better exact-match in 2 evaluations; stopping early" in capfd.readouterr().err


def kill_in_answers(call: int) -> None:
    """Kills this process while it answers for this time, in the middle of a validation."""
    replies, calls = Replier.replies, []

    def replies_or_die(self, *given, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return replies(self, *given, **options)

    Replier.replies = replies_or_die


class _KillInAnswers:
    def __init__(self, call: int) -> None:
        self.call = call

    def __call__(self) -> None:
        kill_in_answers(self.call)


@only_siglip
def test_killed_in_a_validation(judged, case, tmp_path):
    whole = judged[0].run
    given = settings(case, tmp_path)
    usual = dataclasses.asdict(vlft.SftConfig())
    asked = {k: v for k, v in dataclasses.asdict(given).items() if v != usual[k]}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(asked, default=str))
    process = subprocesses.start(
        ["sft", "--config", str(file)], tmp_path / "errors.txt", _KillInAnswers(3)
    )
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors.txt").read_text()
    (run,) = (tmp_path / "output").glob("*/v0-*")
    assert [score is None for (score,) in metrics(run, "val_score")].count(False) == 2
    assert vlft.sft(vlft.SftConfig(resume=run)).finished
    assert_same(run, whole)
    assert metrics(run, *NAMES) == metrics(whole, *NAMES)
    assert [r["response"] for r in answers(run, 4)] == [r["response"] for r in answers(whole, 4)]


@only_siglip
def test_two_processes_share_the_records(judged, case, tmp_path):
    given, alone = settings(case, tmp_path), judged[0].run
    home = tmp_path / "two"
    assert finish(launch(given, home), home) == [0, 0]
    (run,) = given.output_dir.glob("*/v0-*")
    scores = [[s for (s,) in metrics(one, "val_score") if s is not None] for one in (run, alone)]
    assert len(scores[0]) == 3
    assert scores[0][0] == scores[1][0]
    assert [r["response"] for r in answers(run, 0)] == [r["response"] for r in answers(alone, 0)]


@only_siglip
class TestAMetricOfOnesOwn:
    @pytest.fixture
    def own(self, tmp_path):
        path = tmp_path / "short.py"
        path.write_text("def score(reply, reference):\n    return -len(reply)\n")
        return path

    def test_a_run_does_not_start_it_by_itself(self, case, tmp_path, own):
        one = vlft.sft(settings(case, tmp_path, eval_metric=str(own), max_steps=1))
        assert one.best_score is not None
        more = {"resume": one.run, "max_steps": 2}
        with pytest.raises(UsageError, match=r"--eval-metric: the run has .*short\.py, whose code"):
            vlft.sft(vlft.SftConfig(**more))
        assert vlft.sft(vlft.SftConfig(**more, eval_metric=str(own))).step == 2

    @pytest.mark.parametrize(("command", "key"), [("sft", "eval_metric"), ("eval", "metric")])
    def test_nor_does_a_file_of_settings(self, tmp_path, own, command, key):
        file = tmp_path / "settings.json"
        file.write_text(json.dumps({key: str(own)}))
        with pytest.raises(UsageError, match=rf"{key}: found .*short.py, whose code no file of"):
            read_settings(COMMANDS[command].config, command, ["--config", str(file)])


@only_siglip
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eval_metric": "ter"}, "--eval-metric: found 'ter'"),
        ({"eval_metric": "perplexity"}, "--eval-metric: found 'perplexity'"),
        ({"val_dataset": (), "val_ratio": 0}, "--eval-metric: needs validation data"),
        ({"eval_metric": "json-fields"}, "name an --eval-metric that fits the data"),
    ],
)
def test_what_is_refused(case, tmp_path, change, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        vlft.sft(settings(case, tmp_path, **change))


def test_sharded_weights_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(
        accelerator, "_start_accelerate", lambda *_: Backend(None, World(0, 2, True, True), 1.0)
    )
    given = settings(SIGLIP, tmp_path)
    with pytest.raises(UsageError, match="--eval-metric: answers come from a model that each"):
        accelerator.start_backend(given, Placement(torch.device("cpu"), torch.float32))


def test_a_link_in_the_place_of_the_answers(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
    (other / "step-1.jsonl").write_text("mine")
    (run / "answers").symlink_to(other)
    with pytest.raises(CheckpointError, match="answers: a link"):
        write_answers(run, 2, [{"response": "a", "score": 1.0}], {0})
    assert [path.name for path in other.iterdir()] == ["step-1.jsonl"]


def test_only_base_best_and_last_are_kept(tmp_path):
    rows = [{"response": "a", "score": 1.0}]
    for step, best in ((0, 0), (2, 2), (4, 2), (6, 2)):
        write_answers(tmp_path, step, rows, {0, best})
    (tmp_path / "answers" / "notes.txt").write_text("mine")
    write_answers(tmp_path, 8, rows, {0, 2})
    names = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert names == ["notes.txt", "step-0.jsonl", "step-2.jsonl", "step-8.jsonl"]
    assert read_answers_at(tmp_path, 2) == rows
    assert read_answers_at(tmp_path, 4) == []


def test_the_table_has_80_columns(monkeypatch):
    """Wide characters take two; those first whose score changed most."""
    rows = [
        {
            "query": "<image>" + "问题" * 40,
            "label": "是" * 30,
            "response": "否\n" * 9,
            "score": 0.0,
        },
        {"query": "b", "label": "c", "response": "d", "score": 0.0},
    ]
    tuned = [dict(rows[0], score=0.5), dict(rows[1], response="[red]c", score=1.0)]
    out = Console(width=80, file=io.StringIO())
    out.print(answers_table(by_change(rows, tuned), "exact-match"))
    lines = out.file.getvalue().splitlines()
    assert all(cell_len(line) <= 80 for line in lines)
    assert lines[1].split() == ["b", "c", "d", "[red]c", "0.00", "->", "1.00"]
    assert lines[2].startswith("问题")
    assert "…" in lines[2]
    assert "0.00 -> 0.50" in lines[2]
