"""Whole runs: what they write, and that stopping and resuming changes nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import (
    GOLDEN,
    HYBRID,
    SIGLIP,
    VL2_NOAUX,
    make_rows,
    only_siglip,
    without_ocr2,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from tolerances import assert_close

import vlft
from vlft import console
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.runs import (
    checkpoints_in,
    find_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    sweep,
    write_run_config,
)
from vlft.errors import CheckpointError, ConfigError, DataError, UsageError, VlftError
from vlft.families.base import encode_images
from vlft.training import checkpointer, loop
from vlft.training import run as training_run
from vlft.training.backend import Backend
from vlft.training.interrupt import Interrupt
from vlft.training.model import prepare_model
from vlft.vision.encode import pixels_of


@pytest.fixture
def config(case, train_file, tmp_path):
    """A short LoRA run: 10 samples, 2 of them for validation, 4 steps of 2."""
    write_jsonl(train_file, make_rows(10, case))
    return vlft.SftConfig(
        model=str(case.folder),
        **case.settings,
        dataset=(str(train_file),),
        image_root=GOLDEN / "images",
        val_ratio=0.2,
        output_dir=tmp_path / "output",
        batch_size=2,
        num_train_epochs=1,
        save_steps=2,
        learning_rate=1e-2,
        lora_dropout=0.1,
        show_sample=False,
    )


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "adapter_model.safetensors")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "model.safetensors")


def same_bits(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def stop_after(monkeypatch, steps: int):
    """Sends this process Ctrl-C within the given step, as a user would."""
    taken = []
    original = loop.take_step

    def take_step(job, rows):
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return original(job, rows)

    monkeypatch.setattr(loop, "take_step", take_step)


def empty_images_after(monkeypatch, step: int, root: Path):
    """Empties all image files after the given step."""
    taken = []
    original = loop.take_step

    def take_step(job, rows):
        done = original(job, rows)
        taken.append(1)
        if len(taken) == step:
            for path in root.glob("*.*"):
                path.write_bytes(b"")
        return done

    monkeypatch.setattr(loop, "take_step", take_step)


class TestRunFolder:
    @only_siglip
    @pytest.mark.draws_curves
    def test_what_a_run_leaves(self, config):
        result = vlft.sft(config)
        run = result.run
        assert result.finished
        assert result.step == 4
        assert run.parent == config.output_dir / Path(config.model).name
        assert run.name.startswith("v0-")
        assert [step for step, _ in checkpoints_in(run)] == [2, 4]
        assert (run / "last").resolve() == run / "checkpoint-4"
        assert (run / "best").resolve().parent == run
        assert (run / "images" / "train_loss.png").read_bytes()[1:4] == b"PNG"
        assert "<svg" in (run / "report.html").read_text("utf-8")
        assert not list(run.glob(".*"))
        saved = json.loads((run / "run_config.json").read_text())
        assert saved["dtype"] == "float32"
        assert saved["learning_rate"] == 1e-2
        record = json.loads((run / "provenance.json").read_text())
        assert record["packages"]["torch"] == torch.__version__
        rows = metrics(run)
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
        evaluated = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
        # The untrained model's loss is logged, but there is no checkpoint of it.
        assert list(evaluated) == [0, 2, 4]
        assert result.best_loss == min(evaluated[2], evaluated[4])
        # A second run gets a folder of its own.
        assert vlft.sft(config).run.name.startswith("v1-")

    @without_ocr2
    def test_it_learns(self, config):
        longer = dataclasses.replace(config, num_train_epochs=8, save_steps=100)
        found = losses(vlft.sft(longer).run)
        assert sum(found[-4:]) < 0.7 * sum(found[:4])

    @only_siglip
    def test_old_checkpoints_go_and_the_best_stays(self, config):
        steady = dataclasses.replace(config, save_steps=1, save_total_limit=1)
        run = vlft.sft(steady).run
        best = int((run / "best").resolve().name.split("-")[1])
        assert {step for step, _ in checkpoints_in(run)} == {4, best}

    @only_siglip
    def test_early_stop(self, config, monkeypatch):
        monkeypatch.setattr(loop, "evaluate", lambda *_: loop.Evaluation(1.0, {}))
        stopping = dataclasses.replace(config, eval_steps=1, early_stop=2, logging_steps=2)
        result = vlft.sft(stopping)
        assert (result.step, result.finished) == (3, True)
        # Step 3 is logged at the end although no log line was due.
        assert [row["step"] for row in metrics(result.run) if "loss" in row] == [2, 3]

    @only_siglip
    def test_flex_attention_needs_a_gpu(self, config):
        with pytest.raises(ConfigError, match="no backward pass of it on the CPU"):
            vlft.sft(dataclasses.replace(config, attn="flex", device="cpu"))

    @only_siglip
    def test_max_steps(self, config):
        assert vlft.sft(dataclasses.replace(config, max_steps=3)).step == 3

    @only_siglip
    @pytest.mark.parametrize("wait", [0.0, 3600.0])
    def test_a_save_draws_the_curves_if_they_are_old(self, config, monkeypatch, wait):
        monkeypatch.setattr(checkpointer, "REDRAW", wait)
        monkeypatch.setattr(training_run, "plot_run", lambda run: None)
        run = vlft.sft(dataclasses.replace(config, max_steps=1)).run
        assert (run / "images").exists() == (wait == 0.0)

    @only_siglip
    def test_tensorboard(self, config):
        run = vlft.sft(dataclasses.replace(config, max_steps=1, report_to="tensorboard")).run
        assert list(run.rglob("events.out.tfevents.*"))


@without_ocr2
class TestInvariance:
    """No way to pack, split or share samples changes a loss."""

    def test_rows_and_sharing(self, config):
        plain = dataclasses.replace(config, lora_dropout=0.0, max_steps=2)
        reference = losses(vlft.sft(plain).run)
        for change in (
            {"tokens_per_microbatch": 150},
            {"gradient_checkpointing": True},
            {"attn": "eager"},
        ):
            found = losses(vlft.sft(dataclasses.replace(plain, **change)).run)
            assert_close(found, reference, "run losses")

    @pytest.mark.parametrize("case", [SIGLIP, HYBRID], indirect=True, ids=str, scope="session")
    def test_full_tuning_in_16_bit_takes_cached_features(self, config):
        """Trained weights are float32 then, frozen towers are not."""
        half = dataclasses.replace(
            config, tuner="full", lora_dropout=0.0, dtype="bfloat16", max_steps=1, val_ratio=0
        )
        found = losses(vlft.sft(half).run)
        live = losses(vlft.sft(dataclasses.replace(half, vision_cache="off")).run)
        assert found == pytest.approx(live, rel=1e-2)

    def test_checkpointing_asks_no_gradients_of_frozen_towers(self, case, folder, processor):
        given = vlft.SftConfig(dataset=("x",), gradient_checkpointing=True, lora_alpha=32.0)
        placement = Placement(torch.device("cpu"), torch.float32)
        model = prepare_model(given, folder, placement, None).module
        sample = processor.encode(make_rows(5)[0], GOLDEN / "images")
        images = pixels_of(sample.images, processor)
        assert model.is_gradient_checkpointing
        features = encode_images(folder.family, model.train(), images.inputs, images.tiles)
        assert not features.requires_grad

    def test_one_step_of_all_samples_is_the_same_without_sharing(self, config):
        whole = dataclasses.replace(config, lora_dropout=0.0, batch_size=100)
        shared = vlft.sft(whole).run
        alone = vlft.sft(dataclasses.replace(whole, share_prefix=False)).run
        assert_close(losses(alone), losses(shared), "run losses")
        saved = [
            next(row["tokens_saved"] for row in metrics(run) if "loss" in row)
            for run in (shared, alone)
        ]
        assert saved[0] > 0.3
        assert saved[1] == 0.0


@without_ocr2
class TestResume:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"tuner": "full", "learning_rate": 1e-3, "lora_dropout": 0.0},
            {"quantize": "nf4", "lora_target_modules": "ALL", "lora_dropout": 0.0},
        ],
        ids=["lora", "full", "nf4-ALL"],
    )
    def test_same_bits_as_a_run_that_never_stopped(self, config, monkeypatch, change):
        self.compare(config, monkeypatch, change)

    @only_siglip
    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "bfloat16"},
            {"use_dora": True, "lora_target_modules": "ALL", "train_aligner": True},
            {"init_lora_weights": "pissa"},
            {"tuner": "full", "learning_rate": 1e-3, "train_vision": True, "lora_dropout": 0.0},
        ],
        ids=["bfloat16", "dora-aligner", "pissa", "full-vision"],
    )
    def test_same_bits_in_other_ways(self, config, monkeypatch, change):
        self.compare(config, monkeypatch, change)

    def compare(self, config, monkeypatch, change, stop=3):
        settings = dataclasses.replace(config, **change)
        read = weights if settings.tuner == "full" else adapter
        whole = vlft.sft(settings)
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            cut = vlft.sft(settings)
        assert (cut.step, cut.finished) == (stop, False)
        rest = vlft.sft(vlft.SftConfig(resume=cut.run))
        assert (rest.run, rest.step, rest.finished) == (cut.run, 4, True)
        assert same_bits(read(whole.run), read(rest.run))
        keys = ("step", "loss", "val_loss", "learning_rate", "grad_norm")
        kept = [
            [{key: row.get(key) for key in keys} for row in metrics(run)]
            for run in (whole.run, rest.run)
        ]
        assert kept[0] == kept[1]

    @only_siglip
    def test_a_log_window_goes_on_where_it_was_cut(self, config, monkeypatch):
        self.compare(config, monkeypatch, {"logging_steps": 4}, stop=3)

    @only_siglip
    def test_an_evaluation_is_abandoned_and_made_up_for(self, config, monkeypatch):
        # Two batches of validation samples or more; Ctrl-C comes in the first one of step 1.
        changed = dataclasses.replace(config, val_ratio=0.5, eval_steps=1, save_steps=100)
        whole = vlft.sft(changed)
        original, modes = loop.row_loss, []

        def row_loss(job, row):
            training = torch.is_grad_enabled()
            if modes and modes[-1] and not training:
                os.kill(os.getpid(), signal.SIGINT)
            modes.append(training)
            return original(job, row)

        monkeypatch.setattr(loop, "row_loss", row_loss)
        cut = vlft.sft(changed)
        monkeypatch.undo()
        assert [row["step"] for row in metrics(cut.run) if "val_loss" in row] == [0]
        assert (cut.step, cut.finished) == (1, False)
        rest = vlft.sft(vlft.SftConfig(resume=cut.run))
        assert rest.best_loss == whole.best_loss
        assert same_bits(adapter(whole.run), adapter(rest.run))
        found = [
            [(row["step"], row.get("loss"), row.get("val_loss")) for row in metrics(run)]
            for run in (whole.run, rest.run)
        ]
        assert found[0] == found[1]
        bests = [(run / "best").resolve().name for run in (whole.run, rest.run)]
        assert bests[0] == bests[1]

    @pytest.mark.parametrize(
        ("case", "step"), [(SIGLIP, 1), (VL2_NOAUX, 2)], indirect=["case"], ids=str
    )
    def test_a_changed_image_is_named_and_nothing_is_lost(
        self, config, monkeypatch, tmp_path, step
    ):
        """Without a cache the towers read files again: before step 2, or in an evaluation."""
        root = shutil.copytree(GOLDEN / "images", tmp_path / "images")
        settings = dataclasses.replace(
            config, image_root=root, vision_cache="off", val_ratio=0.4, save_steps=100, eval_steps=2
        )
        whole = vlft.sft(settings)
        with monkeypatch.context() as patch:
            empty_images_after(patch, step, root)
            with pytest.raises(DataError, match=r"(?s)g: the image has changed.*with --resume"):
                vlft.sft(settings)
        shutil.copytree(GOLDEN / "images", root, dirs_exist_ok=True)
        (cut,) = settings.output_dir.glob("*/v1-*")
        assert [number for number, _ in checkpoints_in(cut)] == [step]
        assert [row["step"] for row in metrics(cut) if "val_loss" in row] == [0]
        assert vlft.sft(vlft.SftConfig(resume=cut)).best_loss == whole.best_loss
        assert same_bits(adapter(whole.run), adapter(cut))

    @only_siglip
    def test_images_may_change_once_their_features_are_kept(self, config, monkeypatch, tmp_path):
        root = shutil.copytree(GOLDEN / "images", tmp_path / "images")
        empty_images_after(monkeypatch, 1, root)
        assert vlft.sft(
            dataclasses.replace(config, image_root=root, vision_cache="memory")
        ).finished

    @only_siglip
    def test_a_finished_run_stays_as_it_is(self, config):
        first = vlft.sft(config)
        before = adapter(first.run)
        again = vlft.sft(vlft.SftConfig(resume=first.run))
        assert again.step == first.step
        assert same_bits(adapter(again.run), before)

    @only_siglip
    def test_from_an_earlier_checkpoint_only_when_asked(self, config):
        run = vlft.sft(config).run
        before = adapter(run)
        early = run / "checkpoint-2"
        with pytest.raises(CheckpointError, match=r"the run goes on to checkpoint-4(.|\n)*--over"):
            vlft.sft(vlft.SftConfig(resume=early))
        again = vlft.sft(vlft.SftConfig(resume=early, overwrite=True))
        assert same_bits(adapter(again.run), before)
        assert [row["step"] for row in metrics(run) if "loss" in row] == [1, 2, 3, 4]

    @only_siglip
    def test_other_settings_are_refused_together(self, config):
        run = vlft.sft(dataclasses.replace(config, max_steps=1)).run
        with pytest.raises(UsageError) as error:
            vlft.sft(vlft.SftConfig(resume=run, lora_rank=16, batch_size=3))
        assert "--lora-rank: found 16, the run has 8" in str(error.value)
        assert "--batch-size: found 3, the run has 2" in str(error.value)

    @only_siglip
    def test_what_changes_no_result_may_change(self, config, monkeypatch):
        stop_after(monkeypatch, 2)
        run = vlft.sft(config).run
        assert vlft.sft(vlft.SftConfig(resume=run, logging_steps=2, save_total_limit=1)).finished

    @only_siglip
    def test_a_stop_before_the_first_logged_step(self, config, monkeypatch):
        """There is nothing to plot yet."""
        stop_after(monkeypatch, 1)
        cut = vlft.sft(dataclasses.replace(config, logging_steps=100))
        assert (cut.step, cut.finished) == (1, False)
        assert vlft.sft(vlft.SftConfig(resume=cut.run)).finished

    @only_siglip
    def test_other_data_is_refused(self, config, monkeypatch):
        stop_after(monkeypatch, 2)
        run = vlft.sft(config).run
        write_jsonl(Path(config.dataset[0]), make_rows(9))
        with pytest.raises(CheckpointError, match="not the one that the run was started with"):
            vlft.sft(vlft.SftConfig(resume=run))

    @only_siglip
    def test_a_damaged_file_costs_the_report_alone(self, config, monkeypatch, capfd):
        """A checkpoint has the settings too."""
        stop_after(monkeypatch, 2)
        run = vlft.sft(config).run
        fields = json.loads((run / "run_config.json").read_text())
        (run / "run_config.json").write_text(json.dumps({**fields, "attn": ""}))
        row = {"step": 2, "loss": 10**30, "val_loss": 10**400}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        assert vlft.sft(vlft.SftConfig(resume=run)).finished
        assert "no report of the run: " in capfd.readouterr().err

    @only_siglip
    @pytest.mark.parametrize("name", ["provenance.json", "split.json"])
    def test_a_field_that_is_null(self, config, monkeypatch, name):
        stop_after(monkeypatch, 2)
        run = vlft.sft(config).run
        fields = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(dict.fromkeys(fields)))
        said = rf"{name}: has no (digest of|validation)"
        with pytest.raises(CheckpointError, match=said):
            vlft.sft(vlft.SftConfig(resume=run))

    @pytest.fixture
    def cut(self, config, tmp_path, monkeypatch):
        """A run that was stopped, on copies of its base and its images."""
        base, images = tmp_path / "base", tmp_path / "images"
        shutil.copytree(config.model, base)
        shutil.copytree(GOLDEN / "images", images)
        changed = dataclasses.replace(config, model=str(base), image_root=images)
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            return vlft.sft(changed).run, base, images

    def resume(self, run, **settings):
        return vlft.sft(vlft.SftConfig(resume=run, **settings))

    def change(self, what, base, images):
        """Changes something; returns the place that messages name."""
        if what == "image":
            shutil.copy(images / "photo_a.jpg", images / "photo_b.jpg")
            return images / "photo_b.jpg"
        if what == "weight":
            weights = load_file(base / "model.safetensors")
            weights["language_model.model.layers.1.mlp.up_proj.weight"][5, 7] += 1
            save_file(weights, base / "model.safetensors")
            return base
        path = base / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_mean": [0.1] * 3}))
        return path

    @only_siglip
    @pytest.mark.parametrize("what", ["image", "weight", "file"])
    def test_a_changed_base_or_image_is_refused_unless_accepted(self, cut, what, capfd):
        run, base, images = cut
        before = (run / "provenance.json").read_bytes()
        place = self.change(what, base, images)
        match = rf"{re.escape(str(place))}: .* not what the run was started(.|\n)*--accept-changes"
        with pytest.raises(CheckpointError, match=match):
            self.resume(run)
        assert (run / "provenance.json").read_bytes() == before
        assert checkpoints_in(run)[-1][0] == 2
        assert self.resume(run, accept_changes=True).finished
        assert f"{place.name}: " in capfd.readouterr().err
        record = json.loads((run / "provenance.json").read_text())
        assert [Path(p) for change in record["changes"] for p in change["changed"]] == [place]
        # What was accepted is what later changes are counted from.
        assert self.resume(run).finished
        assert "not what" not in capfd.readouterr().err

    @only_siglip
    def test_images_that_became_unusable_are_counted(self, cut):
        run, _, images = cut
        path = run / "checkpoint-2" / "run_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "on_bad_sample": "skip"}))
        (images / "photo_b.jpg").write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match="the data has 2 usable images and had 3"):
            self.resume(run)

    @only_siglip
    def test_a_copied_base_and_copied_images_are_the_same(self, cut):
        run, base, images = cut
        for folder in (base, images):
            folder.rename(folder.with_name("away"))
            shutil.copytree(folder.with_name("away"), folder)
            shutil.rmtree(folder.with_name("away"))
        assert self.resume(run).finished

    @only_siglip
    def test_runs_of_older_releases_have_no_such_record(self, cut):
        run, base, images = cut
        path = run / "provenance.json"
        record = json.loads(path.read_text())
        config = record.pop("model_files")["config.json"]
        del record["base_weights"]
        path.write_text(json.dumps({**record, "model_config": config}))
        (run / "image_digests.txt").unlink()
        self.change("image", base, images)
        self.change("weight", base, images)
        assert self.resume(run).finished

    def test_no_such_run(self, tmp_path):
        with pytest.raises(CheckpointError, match="no such folder"):
            vlft.sft(vlft.SftConfig(resume=tmp_path / "nothing"))


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from vlft.checkpoints.runs import save_checkpoint
run = Path(sys.argv[1])
def write(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(run, 6, write, keep=3, best_step=None)
"""


@only_siglip
class TestKilled:
    def test_in_the_middle_of_a_save(self, config):
        run = vlft.sft(config).run
        before = adapter(run)
        command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(run)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert (run / ".checkpoint-6.part").exists()
        assert find_checkpoint(run).name == "checkpoint-4"
        assert same_bits(adapter(run), before)

        def write(folder):
            (folder / "run_config.json").write_text("{}")

        save_checkpoint(run, 6, write, keep=3, best_step=None)
        assert find_checkpoint(run).name == "checkpoint-6"
        assert not list(run.glob(".*"))

    def test_a_full_disk_keeps_what_was_there(self, tmp_path):
        def good(folder):
            (folder / "run_config.json").write_text("{}")

        def full(folder):
            (folder / "x").write_text("x")
            raise OSError(28, "No space left on device")

        save_checkpoint(tmp_path, 1, good, keep=1, best_step=None)
        with pytest.raises(VlftError, match="No space left on device"):
            save_checkpoint(tmp_path, 2, full, keep=1, best_step=None)
        assert [step for step, _ in checkpoints_in(tmp_path)] == [1]
        assert not list(tmp_path.glob(".*"))

    @only_siglip
    def test_a_run_that_cannot_begin_leaves_no_folder(self, config, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(training_run, "write_provenance", full)
        with pytest.raises(
            VlftError, match="No space left on device\n hint: make room, then start"
        ):
            vlft.sft(config)
        assert not list(config.output_dir.iterdir())

    def test_a_full_disk_keeps_the_settings_that_were_there(self, tmp_path, monkeypatch):
        def full(_):
            raise OSError(28, "No space left on device")

        write_run_config(tmp_path, {"a": 1})
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_run_config(tmp_path, {"b": 1})
        assert json.loads((tmp_path / "run_config.json").read_text()) == {"a": 1}
        (tmp_path / ".run_config.json.0123abcd.part").touch()
        sweep(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["run_config.json"]


class TestFileSystems:
    """What a run does where links or flushed folders do not exist, and what a kill leaves."""

    def save(self, run: Path, step: int, **options) -> Path:
        def write(folder):
            (folder / "run_config.json").write_text("{}")
            (folder / "weights").write_text(str(step))

        return save_checkpoint(run, step, write, **{"keep": None, "best_step": None, **options})

    @pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
    def test_links_are_text_files_where_there_are_no_links(
        self, tmp_path, monkeypatch, capsys, number
    ):
        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "symlink_to", refuse)
        for step in (1, 2, 3):
            self.save(tmp_path, step, best_step=1)
        assert (tmp_path / "last").read_text() == "checkpoint-3\n"
        assert find_checkpoint(tmp_path / "last") == tmp_path / "checkpoint-3"
        assert find_checkpoint(tmp_path / "best") == tmp_path / "checkpoint-1"
        assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
        assert capsys.readouterr().err.count("no symbolic links") == 1
        # On a file system that has links, they are links again.
        monkeypatch.undo()
        self.save(tmp_path, 4)
        assert (tmp_path / "last").is_symlink()

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    def test_folders_that_cannot_be_flushed(self, tmp_path, monkeypatch, number):
        flush = os.fsync

        def refuse(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)
        assert self.save(tmp_path, 1).is_dir()

    def test_a_file_that_cannot_be_flushed_is_no_checkpoint(self, tmp_path, monkeypatch):
        def refuse(_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(VlftError, match=r"the first checkpoint could not be written \(Input"):
            self.save(tmp_path, 1)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("deleted", [0, 1])
    def test_a_kill_while_a_checkpoint_is_removed(self, tmp_path, monkeypatch, deleted):
        for step in (1, 2):
            self.save(tmp_path, step)
        remove, left = os.unlink, [deleted]

        def killed(*given, **options):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            remove(*given, **options)

        monkeypatch.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(tmp_path / "checkpoint-1")
        monkeypatch.undo()
        assert [step for step, _ in checkpoints_in(tmp_path)] == [2]
        (tmp_path / ".checkpoint-7.part").mkdir()
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "last"}


class TestInterrupt:
    def test_the_second_stops_at_once(self):
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_a_hangup_asks_for_a_stop_unless_nohup_ignores_it(self):
        before = signal.getsignal(signal.SIGHUP)
        try:
            with Interrupt() as interrupt:
                # The shell and the system may both send one.
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGHUP)
                assert interrupt.asked
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with Interrupt() as interrupt:
                os.kill(os.getpid(), signal.SIGHUP)
                assert not interrupt.asked
        finally:
            signal.signal(signal.SIGHUP, before)
            console.err.quiet = False

    def test_signals_are_given_back(self):
        before = signal.getsignal(signal.SIGINT)
        with Interrupt():
            assert signal.getsignal(signal.SIGINT) != before
        assert signal.getsignal(signal.SIGINT) == before


@only_siglip
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            0,
            r"the base model \S+: .*loss is nan before any step(.|\n)*--dtype float32",
        ),
        (1, r"training: the loss is nan(.|\n)*lower --learning-rate"),
    ],
)
def test_a_loss_that_is_not_a_number_stops_the_run(config, monkeypatch, steps, message):
    right = loop.row_loss

    def broken(job, row):
        done = job.backend.scheduler.state_dict()["last_epoch"]
        return right(job, row) * (1 if done < steps else float("nan"))

    monkeypatch.setattr(loop, "row_loss", broken)
    with pytest.raises(VlftError, match=message):
        vlft.sft(config)
    # A run that has no loss yet leaves nothing.
    assert bool(list(config.output_dir.iterdir())) == bool(steps)


@only_siglip
def test_bad_data_is_named_before_the_model_is_loaded(config, monkeypatch, train_file):
    monkeypatch.setattr("vlft.training.model.load_model", pytest.fail)
    rows = make_rows(20)
    rows[3]["images"] = ["not_there.jpg"]
    rows[7]["response"] = " "
    write_jsonl(train_file, rows)
    with pytest.raises(UsageError) as error:
        vlft.sft(config)
    assert "train.jsonl:4: " in str(error.value)
    assert "no such image" in str(error.value)
    assert 'train.jsonl:8: "response" is empty' in str(error.value)


@only_siglip
def test_a_target_that_matches_nothing_leaves_no_run(config):
    with pytest.raises(ConfigError, match="'nothing_proj' matches no linear layer"):
        vlft.sft(dataclasses.replace(config, lora_target_modules="nothing_proj"))
    assert not config.output_dir.exists()


@only_siglip
@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_there(config):
    with pytest.raises(ConfigError, match="found wandb, which is not installed"):
        vlft.sft(dataclasses.replace(config, report_to="wandb"))


@only_siglip
def test_the_shown_sample_marks_what_is_trained(config, capsys):
    vlft.sft(dataclasses.replace(config, max_steps=1, show_sample=True))
    shown = capsys.readouterr().err
    assert "⟦ It is " in shown
    assert "<｜end▁of▁sentence｜>⟧" in shown
    assert "<image_placeholder>x36" in shown


@only_siglip
def test_a_gradient_that_is_not_a_number_stops_the_run(config, monkeypatch):
    monkeypatch.setattr(Backend, "step", lambda _backend: float("nan"))
    with pytest.raises(VlftError, match="the gradient norm is nan"):
        vlft.sft(config)
    # A failed run leaves nothing in the process that would disturb the next one.
    monkeypatch.undo()
    assert vlft.sft(dataclasses.replace(config, dtype="bfloat16", max_steps=1)).finished


@only_siglip
def test_overwrite_is_not_remembered(config, monkeypatch):
    run = vlft.sft(dataclasses.replace(config, save_steps=1)).run
    vlft.sft(vlft.SftConfig(resume=run / "checkpoint-3", overwrite=True))
    with pytest.raises(CheckpointError, match="the run goes on to checkpoint-4"):
        vlft.sft(vlft.SftConfig(resume=run / "checkpoint-3"))


@pytest.mark.parametrize("case", [VL2_NOAUX], indirect=True, scope="session", ids=str)
def test_a_full_run_keeps_the_correction_bias(case, config):
    """It only chooses experts: it neither trains nor is rounded."""
    full = {"tuner": "full", "lora_dropout": 0.0}
    run = vlft.sft(dataclasses.replace(config, **full, dtype="bfloat16", max_steps=1)).run
    name = "language.model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = load_file(case.folder / "model.safetensors")[name], weights(run)[name]
    assert torch.equal(before, after)
