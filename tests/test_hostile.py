"""Damaged files of every kind, odd images and outputs: one message each, nothing eaten or changed.

``--mutations N`` asks for more than the short form, which takes two families; ``make hostile`` asks
for 3,000, with a sixth as many images and a fifteenth as many outputs. ``--hostile-seed`` asks for
other ones.
"""

from __future__ import annotations

import importlib
import random
import re
import shutil
from collections import Counter
from typing import TYPE_CHECKING

import hostile
import odd_targets
import pytest
from conftest import GOLDEN, HYBRID, JANUS_PRO, MATRIX, OCR, SIGLIP, VL2_NOAUX, write_jsonl
from damage import damage, write_image
from PIL import Image

import vlft
import vlft.checkpoints.convert
import vlft.checkpoints.merge
import vlft.cli.check
import vlft.inference.run
import vlft.training.plots
import vlft.training.run
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.runs import checkpoints_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import FamilyCase

# With fewer mutations, only these.
SHORT = [SIGLIP, VL2_NOAUX]
ENOUGH_FOR_ALL = 300
SEED = "--hostile-seed"


def pytest_generate_tests(metafunc):
    many = metafunc.config.getoption("--mutations") >= ENOUGH_FOR_ALL
    if "checkpoint" in metafunc.fixturenames:
        rows = MATRIX if many else SHORT
        metafunc.parametrize("checkpoint", rows, ids=str, scope="module", indirect=True)
    if "layout" in metafunc.fixturenames:
        rows = [SIGLIP, HYBRID, JANUS_PRO, OCR] if many else [SIGLIP]
        metafunc.parametrize("layout", rows, ids=str)


class Trials:
    """Faults that damage has brought out, and how often commands have ended how."""

    def __init__(self, home: Path, count: float, seed: str) -> None:
        """The folder is for the trials alone; at least one is made."""
        self.stage = hostile.Stage(home / "stage")
        self._count, self._seed = max(1, round(count)), seed
        self._faults: dict[str, str] = {}
        self.codes: Counter[int | None] = Counter()

    def __iter__(self):
        """Yields for each trial its number and its own source of random numbers."""
        for number in range(self._count):
            yield number, random.Random(f"{self._seed} {number}")

    def run(
        self, words: list[str], what: str, names: list[str], may_change: Callable[[str], bool]
    ) -> None:
        """Runs a command line on the stage.

        Args:
            words: the command line.
            what: was done to a file, for the report.
            names: a refusal holds one of them.
            may_change: whether a path may be another after a success.
        """
        outcome, changed = self.stage.run(words)
        self.codes[outcome.code] += 1
        found = outcome.faults(names)
        wrong = [path for path in changed if outcome.code != 0 or not may_change(path)]
        # The cache of vlft is for any command to fill.
        wrong = [path for path in wrong if not path.startswith("user/cache/vlft")]
        left = [path for path in changed if path.endswith((".part", ".old", ".lock"))]
        # A refusal may come after the folder of the output was made.
        if wrong := [path for path in {*wrong, *left} if path != "output"]:
            found.append(f"changed {wrong}")
        if found:
            self._faults[f"{' '.join(words)[:300]}: {what}: {', '.join(found)}"] = outcome.errors[
                -600:
            ]

    def report(self, capsys) -> None:
        with capsys.disabled():
            # At once, because a long run may be stopped before pytest tells.
            faults = (f"\n{what}\n   {said}" for what, said in self._faults.items())
            print(f"\n{dict(self.codes)}", *faults, end=" ")
        assert not self._faults

    def damage_files(
        self,
        source: Path,
        kinds: tuple[str, ...],
        command: Callable[[random.Random], list[str]],
        may_change: str = "output/",
    ) -> None:
        """Damages one file of a copy of a folder in each trial, in turns."""
        paths = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        files = [path for path in paths if path.name.endswith(kinds)]
        for number, chance in self:
            self.stage.set_up(source)
            file = self.stage.copy / files[number % len(files)]
            how = damage(file, chance)
            # A file that a field names is named where it is read; of weights only scores tell.
            names = {path.name for path in paths} | {
                "its scores are no numbers",
                "its weights may be damaged",
            }
            names |= set(re.findall(r"\w+\.json|(?<== ')[^']{2,20}", how))
            self.run(
                command(chance),
                f"{file.relative_to(self.stage.copy)}: {how}",
                sorted(names),
                lambda path: path.startswith(may_change),
            )


@pytest.fixture
def trials(request, tmp_path):
    """Makes the trials of a test.

    A share of ``--mutations`` is its count; the name goes into the seed, so that tests differ.
    """
    seed = request.config.getoption(SEED)
    total = request.config.getoption("--mutations")

    def start(share: float, name: object) -> Trials:
        return Trials(tmp_path, share * total, f"{seed} {name}")

    return start


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four records about an image."""
    folder = tmp_path_factory.mktemp("data")
    Image.effect_mandelbrot((48, 40), (-2, -1, 1, 1), 50).convert("RGB").save(folder / "a.png")
    row = {"query": "<image>What is it?", "response": "A photo.", "images": ["a.png"]}
    return write_jsonl(folder / "data.jsonl", [row] * 4)


@pytest.fixture(scope="module", autouse=True)
def golden_stays():
    """The models that trials read outside of their stage are as they were."""
    before = hostile.tree(GOLDEN / "checkpoints")
    yield
    assert hostile.tree(GOLDEN / "checkpoints") == before


@pytest.fixture(scope="module", autouse=True)
def no_drawing():
    """Curves are read and not drawn, which took half of the time of a run of one step.

    matplotlib lists the system's fonts when it is imported; trials would do that each.
    """
    importlib.import_module("matplotlib.font_manager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlft.training.plots._Figure, "save", lambda *_: None)
        yield


def mode_of(case: FamilyCase) -> list[str]:
    return ["--image-mode", case.image_mode] if case.image_mode else []


def warm(case: FamilyCase) -> None:
    """Imports what the models of a family need, so that trials need not."""
    placement = Placement(vlft.training.run.torch.device("cpu"), vlft.training.run.torch.float32)
    load_model(describe(case.folder), placement)


@pytest.fixture(scope="module")
def checkpoint(request) -> FamilyCase:
    warm(request.param)
    return request.param


@pytest.fixture(scope="module")
def run(checkpoint, data, tmp_path_factory) -> Path:
    """A run that was stopped before its last step."""
    settings = vlft.SftConfig(
        model=str(checkpoint.folder), dataset=(str(data),), **checkpoint.settings,
        output_dir=tmp_path_factory.mktemp("runs"), max_steps=2, save_steps=1, batch_size=2,
        show_sample=False, vision_cache="memory",
    )  # fmt: skip
    run = vlft.sft(settings).run
    shutil.rmtree(run / "checkpoint-2")
    for name in ("best", "last"):
        (run / name).unlink(missing_ok=True)
    return run


def of_a_model(case: FamilyCase, data: Path, stage: hostile.Stage):
    """A function that draws a command line which reads the model folder on the stage."""
    model, output = str(stage.copy), stage.output
    training = [
        "--max-steps", "1", "--batch-size", "2", "--no-show-sample", "--vision-cache", "memory"
    ]  # fmt: skip
    commands = [
        ["infer", "--model", model, "--dataset", f"{data}#1", "--max-new-tokens", "1",
         "--output", str(output / "new.jsonl"), *mode_of(case)],
        ["convert", model, str(output / "new")],
        ["sft", "--model", model, "--dataset", str(data), "--output-dir", str(output), *training,
         *mode_of(case)],
        ["check", str(data), "--model", model],
    ]  # fmt: skip
    return lambda chance: chance.choices(commands, (5, 2, 2, 1))[0]


MODEL_FILES = (".json", ".safetensors", ".bin")


def test_a_model_folder(trials, checkpoint, data, capsys):
    started = trials(0.036, f"model {checkpoint}")
    command = of_a_model(checkpoint, data, started.stage)
    started.damage_files(checkpoint.folder, MODEL_FILES, command)
    started.report(capsys)


def test_a_model_in_the_layout_of_transformers(trials, layout, data, tmp_path, capsys):
    folder = vlft.convert(
        vlft.ConvertConfig(
            src=str(layout.folder), dst=tmp_path / "model", format="transformers",
            max_shard_size="300KB",
        )
    )  # fmt: skip
    started = trials(0.036, f"layout {layout}")
    command = of_a_model(layout, data, started.stage)
    started.damage_files(folder, MODEL_FILES, command)
    started.report(capsys)


def test_an_adapter(trials, checkpoint, run, data, capsys):
    _, source = checkpoints_in(run)[-1]
    started = trials(0.022, f"adapter {checkpoint}")
    stage = started.stage
    commands = [
        ["infer", "--ckpt-dir", str(stage.copy), "--dataset", f"{data}#1", "--device", "cpu",
         "--max-new-tokens", "1", "--output", str(stage.output / "new.jsonl")],
        ["merge-lora", "--ckpt-dir", str(stage.copy), "--output-dir", str(stage.output / "new")],
    ]  # fmt: skip
    kinds = ("config.json", "adapter_model.safetensors")
    started.damage_files(source, kinds, lambda chance: chance.choice(commands))
    started.report(capsys)


def test_a_run(trials, checkpoint, run, capsys):
    started = trials(0.025, f"run {checkpoint}")
    words = [
        "sft",
        "--resume",
        str(started.stage.copy),
        "--no-show-sample",
        "--vision-cache",
        "memory",
    ]
    kinds = (".json", ".jsonl", ".txt", "state.safetensors")
    started.damage_files(run, kinds, lambda _: words, "copy/")
    started.report(capsys)


@pytest.fixture(scope="module")
def answers(data, tmp_path_factory) -> Path:
    """Answers to the first three records of the data."""
    rows = data.with_name("three.jsonl")
    rows.write_text("".join(data.read_text().splitlines(keepends=True)[:3]))
    output = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    vlft.infer(
        vlft.InferConfig(
            model=str(SIGLIP.folder), dataset=(str(rows),), output=output, max_new_tokens=2,
            device="cpu",
        )
    )  # fmt: skip
    return output.parent


def test_a_result_file(trials, data, answers, capsys):
    started = trials(0.05, "results")
    words = [
        "infer", "--model", str(SIGLIP.folder), "--dataset", str(data), "--device", "cpu",
        "--max-new-tokens", "2", "--output", str(started.stage.copy / "answers.jsonl"),
    ]  # fmt: skip
    started.damage_files(answers, (".jsonl", ".json"), lambda _: words, "copy/")
    started.report(capsys)


def test_an_image(trials, data, tmp_path, capsys):
    started = trials(1 / 6, "images")
    stage, source = started.stage, tmp_path / "source"
    source.mkdir()
    write_jsonl(
        source / "data.jsonl", [{"query": "<image>a?", "response": "b", "images": ["odd.image"]}]
    )
    rows = str(stage.copy / "data.jsonl")
    for _, chance in started:
        stage.set_up(source)
        how = write_image(stage.copy / "odd.image", chance)
        case = chance.choice(SHORT)
        infer = [
            "infer", "--model", str(case.folder), "--dataset", rows, "--max-new-tokens", "1",
            "--output", str(stage.output / "new.jsonl"),
        ]  # fmt: skip
        words = chance.choices([["check", rows], infer], (2, 1))[0]
        started.run(words, how, ["odd.image"], lambda path: path.startswith("output/"))
    started.report(capsys)


@pytest.fixture(scope="module")
def belongings(data, answers, tmp_path_factory) -> Path:
    """What a user has: a model, data, a run, earlier outputs, and files of their own."""
    folder = tmp_path_factory.mktemp("belongings")
    shutil.copytree(SIGLIP.folder, folder / "model")
    shutil.copytree(data.parent, folder / "data")
    shutil.copytree(answers, folder / "answers")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine\n")
    settings = vlft.SftConfig(
        model=str(SIGLIP.folder), dataset=(str(data),), output_dir=folder / "runs", max_steps=1,
        batch_size=2, show_sample=False, vision_cache="memory", lora_rank=2,
    )  # fmt: skip
    vlft.sft(settings).run.rename(folder / "run")
    shutil.rmtree(folder / "runs")
    vlft.convert(vlft.ConvertConfig(src=str(SIGLIP.folder), dst=folder / "ours"))
    return folder


def test_an_output(trials, belongings, capsys):
    started = trials(1 / 15, "outputs")
    kinds = odd_targets.all_targets()
    random.Random("outputs").shuffle(kinds)
    for number, chance in started:
        started.stage.set_up(belongings)
        trial = odd_targets.draw(started.stage, kinds[number % len(kinds)], chance)
        started.run(trial.words, trial.what, trial.names, trial.may_change)
    started.report(capsys)
