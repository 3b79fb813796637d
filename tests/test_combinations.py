"""Settings that belong together or exclude each other: none is ignored in silence."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl

import vlft
from vlft.checkpoints.locate import describe
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings
from vlft.errors import UsageError


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
            "resume", "overwrite", "show_sample",
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

    @pytest.mark.parametrize("name", ["sft", "plan"])
    @pytest.mark.parametrize("chosen", [*FLAGS, " ".join(FLAGS)])
    def test_flags_of_lora_are_refused_together(self, name, chosen):
        flags = ", ".join(word for word in chosen.split() if word.startswith("--"))
        assert message(f"{name} --dataset a --tuner full --train-aligner {chosen}") == (
            f"{flags}: only with --tuner lora, found full\n hint: leave it out, or use --tuner lora"
        )

    def test_what_it_may_have(self):
        line = "sft --dataset a --tuner full --train-aligner --train-vision --lora-rank 8"
        assert read(line).train_vision

    def test_a_run_of_an_older_version_goes_on(self, config):
        """Its settings held a LoRA flag, which did nothing."""
        run = vlft.sft(dataclasses.replace(config, tuner="full")).run
        for file in run.rglob("run_config.json"):
            table = json.loads(file.read_text())
            file.write_text(json.dumps(table | {"lora_rank": 64}))
        again = {"resume": run / "checkpoint-2", "overwrite": True}
        assert vlft.sft(vlft.SftConfig(**again)).step == 3
        with pytest.raises(UsageError, match="--lora-rank: found 2, the run has 64"):
            vlft.sft(vlft.SftConfig(**again, lora_rank=2))


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
