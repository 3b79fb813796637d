"""vlft demo runs commands that exist, and counts right answers; make dist runs it whole."""

from __future__ import annotations

import json
import os

import pytest

from vlft.checkpoints.locate import TINY_MODEL
from vlft.cli import demo
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings
from vlft.config import DemoConfig
from vlft.errors import VlftError

# How many of the replies of each command that answers are right.
RIGHT = {"base": 1, "tuned": 3, "merged": 3}


@pytest.mark.parametrize("quick", [True, False])
def test_its_commands(tmp_path, monkeypatch, capsys, quick):
    (tmp_path / "mine.txt").write_text("mine")
    old = tmp_path / "tiny-vl" / "v9-old" / "checkpoint-1"
    old.mkdir(parents=True)
    os.utime(old.parent, (0, 0))
    seen = []

    def run(name, *words):
        settings, _ = read_settings(COMMANDS[name].config, name, list(words))
        seen.append((name, settings))
        if name == "infer":
            answer = [{"response": "a", "label": "b"}, {"response": "a", "label": "a"}]
            rows = [answer[number < RIGHT[settings.output.stem]] for number in range(4)]
            settings.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name == "sft":
            (settings.output_dir / "tiny-vl" / "v10-new" / "checkpoint-7").mkdir(parents=True)
            new = settings.output_dir / "tiny-vl" / "v10-new"
            for path in (new, new / "checkpoint-7"):
                (path / "run_config.json").write_text("{}")

    monkeypatch.setattr(demo, "_vlft", run)
    demo.run_demo(DemoConfig(output_dir=tmp_path, quick=quick))
    names = ["infer", "sft", "infer", "merge-lora", "infer", "eval"]
    assert [name for name, _ in seen] == names
    base, tuning, tuned, merge, merged, scores = (settings for _, settings in seen)
    assert scores.results == (base.output, tuned.output)
    assert base.model == os.path.relpath(TINY_MODEL)
    assert tuning.num_train_epochs == (1 if quick else 6)
    checkpoint = tmp_path / "tiny-vl/v10-new/checkpoint-7"
    assert (tuned.ckpt_dir, merge.ckpt_dir) == ((checkpoint,), checkpoint)
    assert merged.model == str(tmp_path / "merged") == str(merge.output_dir)
    assert tuning.val_dataset == base.dataset == tuned.dataset == merged.dataset
    assert capsys.readouterr().out.splitlines()[-1] == (
        "handwriting exact match: base 25.0% -> tuned 75.0% -> merged 75.0% (4 held-out images)"
    )
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_command_that_fails_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_here", lambda path: "/nowhere")
    monkeypatch.setattr(
        demo.subprocess, "run", lambda *_, **__: demo.subprocess.CompletedProcess([], 2)
    )
    with pytest.raises(VlftError, match="vlft infer ended with 2"):
        demo.run_demo(DemoConfig(output_dir=tmp_path))
