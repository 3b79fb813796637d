"""A run that is extended goes on as a run of its new length."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
import subprocesses
import torch
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl
from safetensors.torch import load_file

import vlft
from vlft.checkpoints.runs import checkpoints_in
from vlft.errors import UsageError
from vlft.settings import flag
from vlft.training import loop
from vlft.training.resume import _instead

TRAIN = Path(__file__).parent.parent / "docs" / "train.md"
FIELDS = dataclasses.fields(vlft.SftConfig)


def settings(home: Path) -> vlft.SftConfig:
    """8 training samples, 2 for validation, 4 steps an epoch, an evaluation every second one."""
    return vlft.SftConfig(
        model=str(SIGLIP.folder),
        dataset=(str(write_jsonl(home / "train.jsonl", make_rows(10))),),
        image_root=GOLDEN / "images",
        val_ratio=0.2,
        output_dir=home / "output",
        batch_size=2,
        num_train_epochs=1,
        save_steps=2,
        save_total_limit=9,
        learning_rate=1e-2,
        lr_scheduler="constant",
        warmup_ratio=0,
        lora_dropout=0.1,
        show_sample=False,
    )


@pytest.fixture
def config(tmp_path):
    return settings(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs from the beginning."""
    home = tmp_path_factory.mktemp("whole")
    return vlft.sft(dataclasses.replace(settings(home), num_train_epochs=2)).run


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The adapter, the moments of the optimiser, and the state of the random numbers."""
    state = load_file(checkpoint / "state" / "state.safetensors")
    return state | load_file(checkpoint / "adapter_model.safetensors")


def assert_same_end(run: Path, other: Path) -> None:
    found, expected = (tensors((path / "last").resolve()) for path in (run, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def metrics(run: Path, *names: str) -> list[list[float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [[row.get(name) for name in ("step", *names)] for row in rows]


def extend(run: Path, **changes) -> Path:
    return vlft.sft(vlft.SftConfig(resume=run, **changes)).run


class TestExtending:
    def test_it_is_the_run_of_that_length(self, config, whole):
        """Order of the data, dropout, moments, best checkpoint and curves are those of one run."""
        run = vlft.sft(config).run
        assert extend(run, num_train_epochs=2) == run
        assert_same_end(run, whole)
        names = ("loss", "val_loss", "learning_rate", "grad_norm", "epoch")
        assert metrics(run, *names) == metrics(whole, *names)
        assert len(metrics(run, "loss")) == 8 + 5
        folders = [[step for step, _ in checkpoints_in(path)] for path in (run, whole)]
        assert folders[0] == folders[1] == [2, 4, 6, 8]
        assert (run / "best").resolve().name == (whole / "best").resolve().name
        assert (run / "run_config.json").read_text() == (
            run / "checkpoint-8" / "run_config.json"
        ).read_text()

    @pytest.mark.parametrize("name", ["cosine", "linear"])
    def test_the_learning_rate_is_that_of_the_new_total(self, config, name, capfd):
        config = dataclasses.replace(config, lr_scheduler=name, warmup_ratio=0.25, val_ratio=0)
        config = dataclasses.replace(config, max_steps=4)
        whole = vlft.sft(dataclasses.replace(config, max_steps=8)).run
        run = vlft.sft(config).run
        first = metrics(run, "learning_rate")
        capfd.readouterr()
        extend(run, max_steps=8)
        said = capfd.readouterr().err
        assert metrics(run, "learning_rate") == first + metrics(whole, "learning_rate")[4:]
        rate = metrics(whole, "learning_rate")[4][1]
        assert "going on after step 4 of 8: --max-steps 4 -> 8\n" in said
        assert f"learning rate {rate:.2e} in step 5: {name} over all 8 steps, warm-up 0.25" in said

    def test_a_new_learning_rate_begins_at_once(self, config):
        run = vlft.sft(config).run
        extend(run, num_train_epochs=2, learning_rate=1e-3, lr_scheduler="linear")
        rates = [rate for _, rate in metrics(run, "learning_rate") if rate]
        assert rates[4:] == pytest.approx([1e-3 * share for share in (0.5, 0.375, 0.25, 0.125)])
        saved = json.loads((run / "last" / "run_config.json").read_text())
        assert (saved["learning_rate"], saved["num_train_epochs"]) == (1e-3, 2)
        (change,) = json.loads((run / "provenance.json").read_text())["changes"]
        assert change["step"] == 4
        assert change["settings"] == {
            "num_train_epochs": [1, 2], "learning_rate": [1e-2, 1e-3],
            "lr_scheduler": ["constant", "linear"],
        }  # fmt: skip
        # The next resume finds it extended, and changes nothing.
        before = tensors((run / "last").resolve())
        assert extend(run) == run
        assert all(torch.equal(t, before[n]) for n, t in tensors((run / "last").resolve()).items())

    def test_epochs_take_the_place_of_steps(self, config):
        run = vlft.sft(dataclasses.replace(config, max_steps=3)).run
        assert metrics(extend(run, num_train_epochs=1), "loss")[-1][0] == 4

    def test_after_early_stopping(self, config, capfd, monkeypatch):
        """A run that --early-stop has ended stays ended until it is given a larger value."""
        monkeypatch.setattr(loop, "evaluate", lambda *_: loop.Evaluation(1.0, {}))
        first = vlft.sft(dataclasses.replace(config, eval_steps=1, early_stop=1))
        assert first.step == 2
        stays = vlft.sft(vlft.SftConfig(resume=first.run, num_train_epochs=2))
        assert stays.step == first.step
        assert "the run is finished; a larger --early-stop extends it" in capfd.readouterr().err
        assert vlft.sft(vlft.SftConfig(resume=first.run, early_stop=99)).step == 8


def kill_in_step(number: int) -> None:
    """Kills this process in its step of this number."""
    from vlft.training import loop

    take_step, steps = loop.take_step, []

    def take_step_or_die(job, plans):
        steps.append(1)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(job, plans)

    loop.take_step = take_step_or_die


class _KillInStep:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> None:
        kill_in_step(self.number)


@pytest.mark.parametrize("step", [1, 4])
def test_killed_before_and_after_its_first_checkpoint(config, whole, tmp_path, step):
    run = vlft.sft(config).run
    process = subprocesses.start(
        ["sft", "--resume", str(run), "--num-train-epochs", "2"],
        tmp_path / "errors.txt", _KillInStep(step),
    )  # fmt: skip
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "errors.txt").read_text()
    assert checkpoints_in(run)[-1][0] == (4 if step == 1 else 6)
    extend(run)  # Its new end stands in its folder.
    assert_same_end(run, whole)
    names = ("loss", "val_loss", "learning_rate", "grad_norm")
    assert metrics(run, *names) == metrics(whole, *names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_steps": 3}, "--max-steps: found 3; 4 are done"),
        ({"num_train_epochs": 1}, "--num-train-epochs: found 1, 5 steps; 6 are done"),
        ({"lora_rank": 4, "max_steps": 9}, "--lora-rank: found 4, the run has 8"),
    ],
)
def test_what_is_refused(config, change, said):
    config = dataclasses.replace(config, val_ratio=0, save_steps=100)
    run = vlft.sft(dataclasses.replace(config, max_steps=6 if "6 are" in said else 4)).run
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    with pytest.raises(UsageError, match=re.escape(said)):
        extend(run, **change)
    assert {path: path.read_bytes() for path in run.rglob("*.json*")} == before


def test_the_table_of_the_docs():
    """Every setting stands in one row of docs/train.md, that which the code has it in."""
    text = TRAIN.read_text("utf-8").split("### What a resumed run may change")[1]
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ")][1:]
    found = {name.strip(): set(re.findall(r"`(--[a-z-]+)`", flags)) for name, _, flags in rows}
    extends, free, own = (
        {flag(f.name) for f in FIELDS if test(f.metadata)}
        for test in (
            lambda meta: meta["on_resume"] == "extends",
            lambda meta: meta["on_resume"] == "free",
            lambda meta: meta["scope"] != "run",
        )
    )
    assert found == {
        "the course from here on": extends, "nothing": free, "this command alone": own,
        "all of the run": set(),
    }  # fmt: skip
    assert not extends & free


def test_what_a_run_of_all_weights_is_told():
    """It has no adapter to begin from."""
    assert _instead(vlft.SftConfig(tuner="full")).endswith("with --model")
    assert _instead(vlft.SftConfig()).endswith("with --adapter")
