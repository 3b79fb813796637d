"""Damaged files of every kind: one message that names the file, nothing changed, nothing eaten.

``--mutations N`` asks for more than the short form; ``make hostile`` asks for 3,000.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from typing import TYPE_CHECKING

import hostile
import pytest
from conftest import GOLDEN, ONE_EACH, SIGLIP, VL2_NOAUX, write_jsonl

import vlft
import vlft.checkpoints.merge
from vlft.checkpoints.runs import checkpoints_in

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PICTURE = str(GOLDEN / "images" / "photo_a.jpg")
ROWS = [{"query": "<image>What is it?", "response": "A photo.", "images": [PICTURE]}] * 4


class Trials:
    """A folder, command lines that read it, and the faults that damage to its files brought out.

    Args:
        home: where copies are made.
        source: the folder.
        kinds: endings of the files that are damaged.
        command: (copy of the folder, output folder) -> command line.
    """

    def __init__(
        self,
        home: Path,
        source: Path,
        kinds: tuple[str, ...],
        command: Callable[[Path, Path], list[str]],
    ) -> None:
        self._home, self._source, self._command = home, source, command
        found = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        self._files = [path for path in found if path.name.endswith(kinds)]
        self.faults: dict[str, str] = {}
        self.codes: Counter[int | None] = Counter()

    def run(self, count: int, seed: int) -> None:
        for number in range(count):
            chance = random.Random(f"{seed} {number}")
            copy, output = self._home / "copy", self._home / "output"
            for folder in (copy, output):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self._source, copy, symlinks=True)
            output.mkdir()
            file = copy / self._files[number % len(self._files)]
            how = hostile.damage(file, chance)
            before = hostile.tree(self._home, without=output)
            outcome = hostile.run(self._command(copy, output), output / "log.txt")
            self.codes[outcome.code] += 1
            faults = outcome.faults([file.name, file.parent.name])
            if outcome.code and hostile.tree(self._home, without=output) != before:
                faults.append("a refused command changed files")
            if faults:
                key = f"{file.relative_to(copy)}: {how}: {', '.join(faults)}"
                self.faults[key] = outcome.errors[-600:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_jsonl(folder / "data.jsonl", ROWS)
    write_jsonl(folder / "one.jsonl", ROWS[:1])
    return folder


def train(home: Path, model: Path) -> Path:
    """A run that was stopped before its last step."""
    settings = vlft.SftConfig(
        model=str(model), dataset=(str(home / "data.jsonl"),), output_dir=home / "runs",
        max_steps=2, save_steps=1, batch_size=2, show_sample=False, vision_cache="memory",
    )  # fmt: skip
    run = vlft.sft(settings).run
    shutil.rmtree(run / "checkpoint-2")
    for name in ("best", "last"):
        (run / name).unlink(missing_ok=True)
    return run


def report(trials: Trials, capsys) -> None:
    with capsys.disabled():
        print(f"\n{dict(trials.codes)}", end=" ")
    assert not trials.faults, "\n".join(f"{k}\n   {v}" for k, v in trials.faults.items())
    assert trials.codes[2] > trials.codes[0] / 10


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_a_model_folder(home, case, mutations, capsys):
    def command(copy, output):
        return [
            "infer", "--model", str(copy), "--dataset", str(home / "one.jsonl"), "--device", "cpu",
            "--max-new-tokens", "1", "--output", str(output / "out.jsonl"),
        ]  # fmt: skip

    trials = Trials(home, case.folder, (".json", ".safetensors"), command)
    trials.run(mutations // 6, seed=1)
    report(trials, capsys)


@pytest.mark.parametrize("case", [SIGLIP, VL2_NOAUX], ids=str)
def test_an_adapter(home, case, mutations, capsys):
    def command(copy, output):
        return [
            "infer", "--ckpt-dir", str(copy), "--dataset", str(home / "one.jsonl"),
            "--device", "cpu", "--max-new-tokens", "1", "--output", str(output / "out.jsonl"),
        ]  # fmt: skip

    _, checkpoint = checkpoints_in(train(home, case.folder))[-1]
    shutil.rmtree(checkpoint / "state")
    trials = Trials(home, checkpoint, ("config.json", ".safetensors"), command)
    trials.run(mutations // 12, seed=2)
    report(trials, capsys)


def test_a_run(home, mutations, capsys):
    def command(copy, output):
        return ["sft", "--resume", str(copy), "--no-show-sample", "--vision-cache", "memory"]

    run = train(home, SIGLIP.folder)
    kinds = (".json", ".jsonl", ".txt", "state.safetensors")
    trials = Trials(home, run, kinds, command)
    trials.run(mutations // 6, seed=3)
    report(trials, capsys)
