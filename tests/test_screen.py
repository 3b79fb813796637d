"""What a run shows at a terminal of 80 columns and elsewhere, and what it draws."""

from __future__ import annotations

import gc
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import SIGLIP
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from vlft import console
from vlft.checkpoints.locate import describe
from vlft.config import SftConfig
from vlft.families.base import Parts
from vlft.training import plots
from vlft.training.plots import POINTS, plot_run
from vlft.training.position import Position
from vlft.training.preview import introduce, parts_table
from vlft.training.progress import RunLog, closing_lines
from vlft.training.trackers import start_trackers

CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def screen(text: str, width: int = 80) -> list[str]:
    """The lines that a terminal shows after this output; colours are left out."""
    lines, row, column = [""], 0, 0
    for number, command, newline, words in CONTROL.findall(text):
        if newline == "\r":
            column = 0
        elif newline == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif command == "A":
            row = max(row - int(number or 1), 0)
        elif command == "K":
            lines[row] = ""
        for character in words:
            if column == width:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch):
    """The standard error of a terminal with 80 columns."""
    err = Console(
        width=80, force_terminal=True, file=io.StringIO(), soft_wrap=True, highlight=False
    )
    monkeypatch.setattr(console, "err", err)
    return err.file


@pytest.fixture
def plain(monkeypatch):
    """Standard error that is a file."""
    err = Console(file=io.StringIO(), soft_wrap=True, highlight=False)
    monkeypatch.setattr(console, "err", err)
    return err.file


METRICS = {
    "loss": 11.5211,
    "learning_rate": 2.99e-3,
    "supervised_tokens_per_second": 1635.0,
    "packed_tokens_per_second": 16584.0,
    "tokens_saved": 0.55,
    "memory_gib": 10.53,
}


class TestProgress:
    def test_the_live_line_keeps_step_bar_loss_and_time_left(self, tmp_path, terminal):
        with RunLog(tmp_path, 12000, 0, None) as log:
            log.advance(3)
            log.step(1000, 1.0, METRICS)
            log.evaluation(1000, 1.25, {}, is_best=True)
            log.step(2000, 2.0, METRICS)
            log.advance(2001)
            log._live.refresh()
            shown = screen(terminal.getvalue())
        assert re.fullmatch(r"step +2001/12000 [━╸╺ ]{20} loss 11\.5211 \d+:\d\d left", shown[-1])
        history = [
            "step 1000/12000  loss 11.5211  lr 2.99e-03  16,584 tok/s  saved 55%  10.53 GiB",
            "step 1000: validation loss 1.2500 (best)",
            "step 2000/12000  loss 11.5211  lr 2.99e-03  16,584 tok/s  saved 55%  10.53 GiB",
        ]
        assert shown[:-1] == history
        assert [line for line in screen(terminal.getvalue()) if line] == history

    def test_elsewhere_a_line_per_log_step(self, tmp_path, plain):
        with RunLog(tmp_path, 300, 0, None) as log:
            log.advance(3)
            log.step(25, 0.5, METRICS)
        (line,) = plain.getvalue().splitlines()
        assert re.fullmatch(
            r"step 25/300  loss 11\.5211  lr 2\.99e-03  1,635 trained tok/s  16,584 tok/s  "
            r"saved 55%  10\.53 GiB  \d+:\d\d left",
            line,
        )
        (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(row) == {"step": 25, "epoch": 0.5, **METRICS}


class TestPreview:
    def model(self) -> nn.Module:
        """The size of the largest published model, trained fully, frozen parts in 4 bit."""
        sizes = {"vision": 413_000_000, "aligner": 40_000_000, "language": 26_910_365_696}
        model = nn.Module()
        for name, size in sizes.items():
            part = nn.Module()
            for number, dtype in enumerate((torch.bfloat16, torch.float32)):
                weight = nn.Parameter(torch.empty(size, device="meta", dtype=dtype))
                part.register_parameter(str(number), weight)
            part.register_parameter("2", nn.Parameter(torch.empty(9, dtype=torch.int8), False))
            model.add_module(name, part)
        return model

    def test_the_parts_fit_80_columns(self, terminal):
        parts = Parts(("vision",), ("aligner",), "language", "head")
        console.err.print(parts_table(self.model(), parts))
        shown = screen(terminal.getvalue())
        assert [line.split()[0] for line in shown if line] == [
            "Model", "part", "vision", "aligner", "language", "head", "all"
        ]  # fmt: skip
        assert "53,820,731,401  53,820,731,392  bfloat16, float32, int8" in shown[4]

    def test_a_sample_breaks_between_words_at_a_terminal(self, terminal):
        folder = describe(SIGLIP.folder)
        processor = folder.processor()
        sample = processor.encode({"query": "What is this?", "response": "A cat."})
        data = ([sample], [])
        introduce(SftConfig(dataset=("a.jsonl",)), nn.Module(), folder, processor, data)
        shown = " ".join(" ".join(screen(terminal.getvalue())).split())
        assert " ".join(sample.text.split()) in shown


class TestClosingLines:
    run = Path("output/tiny-vl/v0-20261121-090213")

    def test_best_and_last_checkpoint(self):
        position = Position(
            step=300,
            best_loss=0.05123,
            best_step=250,
            last_loss=0.0534,
            evaluated_step=300,
            finished=True,
        )
        assert closing_lines(self.run, position, 125.2) == [
            "done: 300 steps in 2:05",
            "best: checkpoint-250, validation loss 0.0512",
            "last: checkpoint-300, validation loss 0.0534",
            f"next: vlft infer --ckpt-dir {self.run}/checkpoint-250 --load-dataset-config",
        ]

    def test_the_last_is_the_best(self):
        position = Position(step=300, best_loss=0.05123, best_step=300, finished=True)
        assert closing_lines(self.run, position, 7325.0)[:2] == [
            "done: 300 steps in 2:02:05",
            "best and last: checkpoint-300, validation loss 0.0512",
        ]

    def test_without_validation(self):
        assert closing_lines(self.run, Position(step=4, finished=True), 1.0) == [
            "done: 4 steps in 0:01",
            "last: checkpoint-4",
            f"next: vlft infer --ckpt-dir {self.run}/checkpoint-4",
        ]

    def test_drawings_are_drawn(self):
        validated = Position(step=4, best_loss=1.0, best_step=4, finished=True)
        assert [
            closing_lines(self.run, position, 1.0, draws=True)[-1]
            for position in (validated, Position(step=4, finished=True))
        ] == [
            f"next: vlft draw --ckpt-dir {self.run}/checkpoint-4 --load-dataset-config",
            f"next: vlft draw --ckpt-dir {self.run}/checkpoint-4 --prompt 'what to draw'",
        ]

    def test_a_stop_before_the_first_step_names_no_checkpoint(self):
        assert closing_lines(self.run, Position(), 5.0) == [
            "stopped after 0:05, before the first step: nothing to go on from"
        ]

    def test_an_interrupted_run_says_how_to_go_on(self):
        run = Path("my output/v0")
        assert closing_lines(run, Position(step=120), 70.0) == [
            "stopped after 1:10, saved as my output/v0/checkpoint-120",
            "go on with: vlft sft --resume 'my output/v0'",
        ]


# Of training, validation and best, as matplotlib draws them.
BLUE, ORANGE, RED = (31, 119, 180), (255, 127, 14), (214, 39, 40)


@pytest.mark.draws_curves
class TestPlots:
    def write(self, run: Path, steps: int, *, validation: bool = True) -> None:
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                row = {"step": step, "loss": 2 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
                file.write(json.dumps(row) + "\n")
                if validation and step % 100 == 0:
                    file.write(json.dumps({"step": step, "val_loss": 2.5 / step}) + "\n")

    def colours(self, path: Path) -> set[tuple[int, ...]]:
        return {pixel for _, pixel in Image.open(path).convert("RGB").getcolors(1 << 20)}

    def test_training_and_validation_share_a_plot_and_the_best_is_marked(self, tmp_path):
        self.write(tmp_path, 300)
        names = ["loss", "train_loss", "val_loss", "learning_rate", "grad_norm"]
        assert [path.stem for path in plot_run(tmp_path)] == names
        images = tmp_path / "images"
        assert self.colours(images / "loss.png") >= {BLUE, ORANGE, RED}
        assert BLUE in self.colours(images / "grad_norm.png")

    def test_without_validation(self, tmp_path):
        self.write(tmp_path, 1, validation=False)
        assert "val_loss" not in [path.stem for path in plot_run(tmp_path)]
        found = self.colours(tmp_path / "images" / "loss.png")
        assert BLUE in found
        assert not found & {ORANGE, RED}

    def test_scores_of_answers_and_the_best_of_them(self, tmp_path):
        rows = [{"step": 1, "val_score": 0.5, "val_best": 1}, {"step": 2, "val_score": 0.25}]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (file,) = plot_run(tmp_path)
        assert file.name == "val_score.png"
        assert self.colours(file) >= {ORANGE, RED}

    def test_no_metrics_yet(self, tmp_path):
        assert plot_run(tmp_path) == []

    def test_a_line_that_a_kill_cut_off(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
        assert [path.stem for path in plot_run(tmp_path)] == ["loss", "train_loss"]

    def test_few_lines_of_a_long_file_are_parsed(self, tmp_path, monkeypatch):
        self.write(tmp_path, 20000)
        parsed, loads = [], json.loads
        monkeypatch.setattr(plots.json, "loads", lambda line: parsed.append(line) or loads(line))
        plot_run(tmp_path)
        assert len(parsed) <= POINTS + 200

    def test_a_save_leaves_no_garbage(self, tmp_path):
        self.write(tmp_path, 100)
        plot_run(tmp_path)
        gc.collect()
        gc.disable()
        plot_run(tmp_path)
        try:
            assert gc.collect() < 1000
        finally:
            gc.enable()


class TestTrackers:
    @pytest.fixture
    def run(self, tmp_path):
        folder = tmp_path / "tiny-vl" / "v0-20261121-090213"
        folder.mkdir(parents=True)
        yield folder
        AcceleratorState._reset_state(reset_partial_state=True)

    def start(self, run: Path, name: str, step: int = 0) -> Accelerator:
        config = SftConfig(dataset=("a.jsonl", "b.jsonl"), learning_rate=3e-3, report_to=name)
        accelerator = Accelerator(cpu=True, project_dir=str(run))
        # Given to the constructor, the name of a package that is not installed would be dropped.
        accelerator.log_with = [name]
        start_trackers(accelerator, config, run, step)
        return accelerator

    def test_tensorboard_has_settings_and_metrics_in_the_run_folder(self, run):
        accelerator = self.start(run, "tensorboard")
        accelerator.log({"loss": 1.5}, step=1)
        accelerator.end_training()
        (settings,) = run.rglob("hparams.yml")
        saved = yaml.safe_load(settings.read_text())
        assert saved["learning_rate"] == 3e-3
        assert json.loads(saved["dataset"]) == ["a.jsonl", "b.jsonl"]
        assert len(list(run.rglob("events.out.tfevents.*"))) == 2

    def test_tensorboard_drops_the_steps_after_the_resumed_one(self, run):
        for first, last in ((0, 5), (3, 6)):
            accelerator = self.start(run, "tensorboard", first)
            for step in range(first + 1, last + 1):
                accelerator.log({"loss": float(10 * first + step)}, step=step)
            accelerator.end_training()
        events = EventAccumulator(str(run / "vlft"))
        events.Reload()
        found = [(event.step, event.value) for event in events.Scalars("loss")]
        assert found == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]

    def test_wandb_has_settings_name_and_folder(self, run, monkeypatch):
        """A stub in the place of wandb, which is not installed with the tests."""
        started, settings = {}, {}
        stub = types.ModuleType("wandb")
        stub.init = lambda **given: started.update(given) or types.SimpleNamespace()
        stub.config = types.SimpleNamespace(update=lambda values, **_: settings.update(values))
        monkeypatch.setitem(sys.modules, "wandb", stub)
        self.start(run, "wandb")
        name = "tiny-vl/v0-20261121-090213"
        identity = started.pop("id")
        assert started == {"project": "vlft", "name": name, "dir": str(run), "resume": "allow"}
        monkeypatch.setenv("WANDB_PROJECT", "digits")
        self.start(run, "wandb", 3)
        assert (started["id"], started["project"]) == (identity, "digits")
        assert settings["learning_rate"] == 3e-3
        assert settings["lora_rank"] == 8
