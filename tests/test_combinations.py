"""Settings that belong together or exclude each other: none is ignored in silence."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl

import vlft
from vlft.checkpoints.locate import describe
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings
from vlft.errors import UsageError
from vlft.inference import side_by_side
from vlft.settings import check, flag, to_json


def command(line: str) -> None:
    """Runs a command line, ``vlft`` left out."""
    name, *words = shlex.split(line)
    COMMANDS[name].run(*read_settings(COMMANDS[name].config, name, words))


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def config(tmp_path):
    """A run of three steps, without validation."""
    return vlft.SftConfig(
        model=str(SIGLIP.folder),
        dataset=(str(write_jsonl(tmp_path / "train.jsonl", make_rows(6))),),
        image_root=GOLDEN / "images",
        val_ratio=0,
        batch_size=2,
        num_train_epochs=1,
        save_steps=1,
        device="cpu",
        output_dir=tmp_path / "output",
        show_sample=False,
    )


class TestWhatBelongsToTheCommand:
    """A run's settings are without those of the command: a file never continues a run."""

    def test_it_is_not_saved(self, config):
        run = vlft.sft(config).run
        again = vlft.SftConfig(resume=run / "checkpoint-2", overwrite=True, show_sample=False)
        saved = vlft.sft(again).run / "checkpoint-3" / "run_config.json"
        names = {field.name for field in dataclasses.fields(vlft.SftConfig)}
        assert names - json.loads(saved.read_text()).keys() == {
            "resume", "overwrite", "accept_changes", "show_sample",
        }  # fmt: skip

    @pytest.mark.parametrize("name", ["run_config.json", "mine.yaml"])
    def test_a_file_of_an_older_version_begins_a_new_run(self, config, tmp_path, capsys, name):
        old = vlft.sft(config).run
        table = json.loads((old / "run_config.json").read_text())
        table |= {"resume": str(old / "checkpoint-1"), "overwrite": True, "show_sample": False}
        file = tmp_path / name
        file.write_text(json.dumps(table))
        before = files_in(old)
        capsys.readouterr()
        command(f"sft --config {file}")
        assert files_in(old) == before
        runs = sorted(path.name[:2] for path in old.parent.iterdir())
        assert runs == ["v0", "v1"]
        assert capsys.readouterr().err.count("warning: ") == 1

    @pytest.mark.parametrize(
        ("content", "left_out"),
        [
            ("resume: RUN\n", "--resume"),
            ("overwrite: true\nresume-from-checkpoint: RUN\n", "--overwrite, --resume"),
            ("resume:\noverwrite: false\n", None),
        ],
    )
    def test_in_a_file_of_the_user(self, tmp_path, capsys, content, left_out):
        file = tmp_path / "c.yaml"
        file.write_text(f"dataset: a.jsonl\n{content}")
        config, given = read_settings(vlft.SftConfig, "sft", ["--config", str(file)])
        assert (config.resume, config.overwrite, given) == (None, False, {"dataset"})
        said = f"warning: {file}: {left_out} not taken from a file; write it as a flag\n"
        assert capsys.readouterr().err == (said if left_out else "")

    def test_as_flags_beside_a_file(self, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text("resume: other\n")
        words = ["--config", str(file), "--resume", "RUN", "--overwrite"]
        assert read_settings(vlft.SftConfig, "sft", words)[0].resume == Path("RUN")

    def test_a_run_that_was_resumed_by_an_older_version_goes_on(self, config):
        run = vlft.sft(config).run
        for file in run.rglob("run_config.json"):
            table = json.loads(file.read_text())
            file.write_text(json.dumps(table | {"resume": "nowhere", "overwrite": True}))
        # The checkpoints after it are kept, because this command does not say --overwrite.
        with pytest.raises(vlft.VlftError, match="the run goes on to checkpoint-3"):
            vlft.sft(vlft.SftConfig(resume=run / "checkpoint-1"))
        assert vlft.sft(vlft.SftConfig(resume=run)).step == 3


def message(line: str) -> str:
    """The error of a command line."""
    with pytest.raises(UsageError) as error:
        read(line)
    assert error.value.exit_code == 2
    return str(error.value)


def read(line: str):
    name, *words = shlex.split(line)
    return read_settings(COMMANDS[name].config, name, words)[0]


class TestFullTuning:
    FLAGS = (
        "--lora-target-modules ALL", "--lora-rank 9", "--lora-alpha 1", "--lora-dropout 0.01",
        "--use-dora", "--use-rslora", "--init-lora-weights gaussian",
    )  # fmt: skip
    DEFAULTS = (
        "--lora-target-modules qkv", "--lora-rank 8", "--lora-alpha 32", "--lora-dropout 0",
        "--use-dora false", "--use-rslora false", "--init-lora-weights default",
    )  # fmt: skip

    @pytest.mark.parametrize("name", ["sft", "plan"])
    @pytest.mark.parametrize("chosen", [*FLAGS, " ".join(FLAGS), *DEFAULTS, " ".join(DEFAULTS)])
    def test_flags_of_lora_are_refused_together(self, name, chosen):
        flags = ", ".join(word for word in chosen.split() if word.startswith("--"))
        assert message(f"{name} --dataset a --tuner full --train-aligner {chosen}") == (
            f"{flags}: only with --tuner lora, found full\n hint: leave it out, or use --tuner lora"
        )

    def test_what_it_may_have(self):
        line = "sft --dataset a --tuner full --train-aligner --train-vision"
        assert read(line).train_vision

    @pytest.mark.parametrize("name", ["lora_rank", "lora-alpha", "use_rslora"])
    def test_in_a_file(self, tmp_path, name):
        file, value = tmp_path / "c.yaml", getattr(vlft.SftConfig(), name.replace("-", "_"))
        file.write_text(f"tuner: full\n{name}: {json.dumps(value)}\n")
        place = flag(name)
        assert message(f"sft --dataset a --config {file}").startswith(f"{place}: only with --tuner")
        # A flag of the command line beside the file.
        file.write_text(f"{name}: {json.dumps(value)}\n")
        found = message(f"sft --dataset a --config {file} --tuner full --init-lora-weights default")
        assert found.startswith(f"{place}, --init-lora-weights: only with --tuner lora, found full")

    @pytest.mark.parametrize("name", ["lora_rank", "lora_target_modules", "use_dora"])
    def test_in_python(self, config, name):
        chosen = {name: getattr(vlft.SftConfig(), name)}
        full = vlft.SftConfig(dataset=("a",), tuner="full", **chosen)
        for same in (full, pickle.loads(pickle.dumps(full)), copy.deepcopy(full)):
            with pytest.raises(UsageError, match=f"^{flag(name)}: only with --tuner lora"):
                check(same)
        check(dataclasses.replace(config, tuner="full"))
        with pytest.raises(UsageError, match=r"^--lora-alpha: only with --tuner lora"):
            check(dataclasses.replace(config, tuner="full", lora_alpha=4))

    def test_the_settings_of_a_run_begin_another(self, config, tmp_path):
        """They name every flag, those that were not given too."""
        saved = to_json(dataclasses.replace(config, tuner="full"))
        file = tmp_path / "copied.json"
        file.write_text(json.dumps(saved))
        assert check(read(f"sft --config {file}")).lora_rank == 8
        found = message(f"sft --config {file} --lora-rank 8")
        assert found.startswith("--lora-rank: only with --tuner lora")

    def test_a_run_of_an_older_version_goes_on(self, config):
        """Its settings held a LoRA flag, which did nothing."""
        run = vlft.sft(dataclasses.replace(config, tuner="full")).run
        for file in run.rglob("run_config.json"):
            table = json.loads(file.read_text())
            file.write_text(json.dumps(table | {"lora_rank": 64}))
        again = {"resume": run / "checkpoint-2", "overwrite": True}
        assert vlft.sft(vlft.SftConfig(**again)).step == 3
        for rank in (2, 8):
            with pytest.raises(UsageError, match=f"--lora-rank: found {rank}, the run has 64"):
                vlft.sft(vlft.SftConfig(**again, lora_rank=rank))


class TestValidation:
    NEEDED = " needs validation data\n hint: name --val-dataset or raise --val-ratio"

    @pytest.mark.parametrize("name", ["sft", "plan"])
    @pytest.mark.parametrize(
        ("flags", "place"),
        [
            ("--early-stop 3", "--early-stop:"),
            ("--eval-steps 5", "--eval-steps:"),
            ("--eval-steps 2 --early-stop 9", "--early-stop, --eval-steps:"),
        ],
    )
    def test_what_needs_it(self, name, flags, place):
        assert message(f"{name} --dataset a --val-ratio 0 {flags}") == place + self.NEEDED
        assert read(f"{name} --dataset a --val-ratio 0 --val-dataset b {flags}")
        assert read(f"{name} --dataset a {flags}")

    @pytest.mark.parametrize("name", ["sft", "plan"])
    def test_the_data_leaves_none(self, config, tmp_path, name):
        data = write_jsonl(tmp_path / "one.jsonl", make_rows(5)[:1])
        line = f"{name} --model {config.model} --dataset {data} --image-root {config.image_root}"
        with pytest.raises(UsageError, match=f"^--early-stop:{self.NEEDED}"):
            command(f"{line} --early-stop 2 --device cpu --output-dir {tmp_path}")

    def test_a_run_of_an_older_version_goes_on(self, config):
        run = vlft.sft(config).run
        for file in run.rglob("run_config.json"):
            table = json.loads(file.read_text())
            file.write_text(json.dumps(table | {"early_stop": 1}))
        again = vlft.SftConfig(resume=run / "checkpoint-2", overwrite=True)
        assert vlft.sft(again).step == 3


class TestMaxSteps:
    """They alone decide, as in transformers."""

    @pytest.mark.parametrize("steps", [2, 7])
    def test_of_a_run(self, config, steps):
        run = vlft.sft(dataclasses.replace(config, max_steps=steps)).run
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == steps
        assert rows[-1]["epoch"] == pytest.approx(steps / 3, abs=1e-4)
        # The schedule ends with them.
        assert 0 < rows[-1]["learning_rate"] < 0.51 * rows[0]["learning_rate"]

    def test_of_a_plan(self, config, capsys):
        line = f"plan --model {config.model} --dataset {config.dataset[0]} --device cpu"
        line += f" --image-root {config.image_root} --val-ratio 0 --batch-size 2"
        command(f"{line} --max-steps 100")
        assert "3 steps; 100 steps in all" in capsys.readouterr().out
        command(line)
        assert "3 steps; 9 steps in all" in capsys.readouterr().out

    def test_a_finished_run_of_an_older_version_stays_finished(self, config):
        """It ended with its epochs."""
        run = vlft.sft(config).run
        for file in run.rglob("run_config.json"):
            table = json.loads(file.read_text())
            file.write_text(json.dumps(table | {"max_steps": 100}))
        before = files_in(run)
        assert vlft.sft(vlft.SftConfig(resume=run)).step == 3
        assert files_in(run) == before


class TestMaxLength:
    """``--max-length`` beyond the model's own limit is said, and never the remedy."""

    TOO_MUCH = "the model takes at most LIMIT; shorten it, or use --on-long skip"

    @pytest.mark.parametrize("name", ["sft", "plan"])
    @pytest.mark.parametrize(
        ("flags", "said", "hint"),
        [
            ("", "", f"{TOO_MUCH} or truncate-history"),
            ("--max-length 30000", "--max-length 30000: the model takes at most LIMIT tokens",
             f"{TOO_MUCH} or truncate-history"),
            ("--max-length 100 --on-long truncate-history", "",
             f"it is too long even without its history; {TOO_MUCH}"),
        ],
    )  # fmt: skip
    def test_beyond_the_model(self, config, tmp_path, capsys, name, flags, said, hint):
        limit = str(describe(SIGLIP.folder).processor().max_length)
        row = {"query": 10_000 * "What? ", "response": "That."}
        line = f"{name} --model {config.model} {flags} --dataset "
        with pytest.raises(UsageError) as error:
            command(f"{line}{write_jsonl(tmp_path / 'long.jsonl', [row])}")
        assert error.value.hint == hint.replace("LIMIT", limit)
        written = capsys.readouterr().err
        assert said.replace("LIMIT", limit) in written
        assert written.count("warning") == bool(said)

    def test_within_the_model(self, config):
        with pytest.raises(UsageError, match="raise --max-length, or use --on-long skip or trunc"):
            vlft.sft(dataclasses.replace(config, max_length=30))


HUB = "only for a hub id, found a folder or no model"


class TestWhatExcludesEachOther:
    @pytest.mark.parametrize(
        ("line", "found"),
        [
            (f"sft --dataset a --revision v1 --model {SIGLIP.folder}", f"--revision: {HUB}"),
            ("plan --revision v1", f"--revision: {HUB}"),
            ("infer --ckpt-dir c --revision v1", f"--revision: {HUB}"),
            ("merge-lora --ckpt-dir c --revision v1", f"--revision: {HUB}"),
            (f"convert {SIGLIP.folder} DST --revision v1", f"--revision: {HUB}"),
            ("plan --model a/b --resume RUN", "--resume: only for vlft sft; a plan is of a new "),
            ("plan --model a/b --val-dataset v", "--val-dataset: needs training data"),
            ("plan --tuner full", "--tuner: found full; the table of all models is of LoRA"),
            ("infer --ckpt-dir c --load-dataset-config --on-bad-sample skip",
             "--on-bad-sample: found together with --load-dataset-config, which reads the data as"),
            ("infer --ckpt-dir c --load-dataset-config --system ''", "--system: belongs to a chat"),
            *[
                (f"infer --model a/b {flags}", f"{', '.join(flags.split()[::2])}: only for answers")
                for flags in (
                    "--output r.jsonl", "--show-samples 0", "--image-root i --batch-size 2",
                    "--on-bad-sample skip --output r.jsonl",
                )
            ],
            ("infer --ckpt-dir c --batch-size 8", "--batch-size: only for answers to a data set"),
            ("sft --dataset a --adapter c --lora-rank 8 --train-aligner false",
             "--lora-rank, --train-aligner: the adapter says it\n hint: leave it out"),
            ("infer --ckpt-dir c --overwrite", "--overwrite: only for answers to a data set, found "
             "a chat\n hint: leave it out, or add --dataset, --image or --load-dataset-config"),
        ],
    )  # fmt: skip
    def test_it_is_refused(self, line, found):
        assert message(line).startswith(found)

    @pytest.mark.parametrize(
        "line",
        [
            "sft --dataset a --model a/b --revision v1",
            "infer --ckpt-dir c --model a/b --revision v1 --hub modelscope",
            "infer --ckpt-dir c --load-dataset-config --image-root i --batch-size 2 --overwrite",
            "infer --model a/b --dataset d --output r.jsonl --show-samples 0 --on-bad-sample skip",
            "infer --model a/b --system x --max-new-tokens 9 --temperature 1 --top-p 0.5 --seed 1",
            "sft --resume RUN --overwrite --gradient-checkpointing",
            "sft --dataset a --val-dataset b --val-ratio 0",
            "sft --dataset a --train-vision --vision-cache off",
            "sft --dataset a --lr-scheduler constant --warmup-ratio 0.1",
            "sft --dataset a --num-train-epochs 9",
            "plan --model a/b --quantize nf4 --gpu 80GB",
            "plan --device cpu",
        ],
    )
    def test_what_goes_together(self, line, capsys):
        check(read(line))
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("sft --dataset a --val-dataset b --val-ratio 0.2",
             "--val-ratio has no effect: --val-dataset is given"),
            ("sft --dataset a --num-train-epochs 5 --max-steps 7",
             "--num-train-epochs has no effect: --max-steps is given"),
            ("plan --model a/b --train-vision --vision-cache disk",
             "--vision-cache has no effect: --train-vision changes the features in every step"),
            ("sft --dataset a --overwrite", "--overwrite has no effect: only --resume meets "
             "checkpoints; a new run gets a folder of its own"),
            (f"sft --dataset a --model {SIGLIP.folder} --hub modelscope",
             "--hub has no effect: only for a hub id, found a folder or no model"),
            ("merge-lora --ckpt-dir c --hub modelscope",
             "--hub has no effect: only for a hub id, found a folder or no model"),
            ("plan --model a/b --device cpu --gpu 80GB",
             "--gpu has no effect: --device cpu is given"),
            ("sft --dataset a --val-dataset b --val-ratio 0.05",
             "--val-ratio has no effect: --val-dataset is given"),
            ("sft --dataset a --num-train-epochs 3 --max-steps 7",
             "--num-train-epochs has no effect: --max-steps is given"),
            ("infer --ckpt-dir c --dataset a --repetition-context reply",
             "--repetition-context has no effect: --repetition-penalty is 1"),
            ("plan --quantize int8 --lora-target-modules ALL",
             "--quantize, --lora-target-modules have no effect: the table of all models shows qkv "
             "and ALL, with and without nf4; name one with --model"),
        ],
    )  # fmt: skip
    def test_it_is_said(self, line, said, capsys):
        config = read(line)
        assert capsys.readouterr().err == ""
        check(config)
        assert capsys.readouterr().err == f"warning: {said}\n"

    @pytest.mark.parametrize("line", ["plan --device cpu --gpu 80GB", "models"])
    def test_by_the_commands(self, line, capsys):
        command(line)
        assert ("--gpu has no effect" in capsys.readouterr().err) == ("gpu" in line)

    def test_on_the_first_rank_alone(self, monkeypatch, capsys):
        monkeypatch.setenv("RANK", "1")
        check(read("sft --dataset a --overwrite"))
        assert capsys.readouterr().err == ""


class TestWhatOnlyTheFilesSay:
    """Settings that have no effect on these data, or on this checkpoint."""

    def test_no_images(self, config, tmp_path, capsys):
        rows = [{"query": "What?", "response": "That."}] * 3
        data = (str(write_jsonl(tmp_path / "text.jsonl", rows)),)
        said = "warning: --image-root has no effect: the data holds no images\n"
        vlft.sft(dataclasses.replace(config, dataset=data, max_steps=1))
        assert said in capsys.readouterr().err
        answering = vlft.InferConfig(
            model=config.model, dataset=data, device="cpu", max_new_tokens=2,
            image_root=config.image_root, output=tmp_path / "r.jsonl", show_samples=0,
        )  # fmt: skip
        vlft.infer(answering)
        assert said in capsys.readouterr().err
        vlft.infer(dataclasses.replace(answering, image_root=None, overwrite=True))
        assert "--image-root" not in capsys.readouterr().err

    def test_a_longer_reply_than_the_model_has_room_for(self, config, tmp_path, capsys):
        rows, limit = [{"query": "What?"}], 120
        model = shutil.copytree(SIGLIP.folder, tmp_path / "model")
        stated = json.loads((model / "config.json").read_text())
        stated["language_config"]["max_position_embeddings"] = limit
        (model / "config.json").write_text(json.dumps(stated))
        vlft.infer(
            vlft.InferConfig(
                model=str(model), dataset=(str(write_jsonl(tmp_path / "a.jsonl", rows)),),
                device="cpu", max_new_tokens=limit + 1, output=tmp_path / "r.jsonl",
            )
        )  # fmt: skip
        said = f"--max-new-tokens {limit + 1}: prompt and reply together have at most {limit} tok"
        assert f"warning: {said}" in capsys.readouterr().err

    def test_of_a_full_run(self, config, tmp_path):
        run = vlft.sft(dataclasses.replace(config, tuner="full", max_steps=1)).run
        data = {"dataset": config.dataset, "ckpt_dir": run}
        with pytest.raises(UsageError, match="--merge-lora: the checkpoint holds a whole model, t"):
            vlft.infer(vlft.InferConfig(**data, merge_lora=True))
        with pytest.raises(
            UsageError, match=r"holds a whole model; .* cannot be its base(.|\n)*--m"
        ):
            vlft.infer(vlft.InferConfig(**data, model=config.model))

    def test_attention_of_a_merged_model(self, config, monkeypatch, tmp_path):
        run = vlft.sft(dataclasses.replace(config, max_steps=1)).run
        seen = []

        original = side_by_side.Replier

        def replier(model, *rest):
            seen.append(model.config._attn_implementation)
            return original(model, *rest)

        monkeypatch.setattr(side_by_side, "Replier", replier)
        for attn in ("eager", "auto"):
            settings = {"attn": attn, "merge_lora": True, "image_root": config.image_root}
            output = tmp_path / f"{attn}.jsonl"
            data = {"ckpt_dir": run, "dataset": config.dataset, "device": "cpu", "output": output}
            vlft.infer(vlft.InferConfig(**data, **settings, max_new_tokens=1))
        assert seen == ["eager", "sdpa"]


def test_the_reader_of_a_pipe_may_leave(tmp_path):
    """As head does: no traceback, and no message of Python's own at exit."""
    code = (
        "import sys, time\nfrom vlft import console\nfrom vlft.cli import app\n"
        "def work():\n    time.sleep(0.5)\n    console.reply(100_000 * 'x')\n"
        "app.app = work\napp.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
