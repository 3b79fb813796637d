"""Runs in several processes, and what they leave."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import subprocesses
from conftest import GOLDEN, make_rows, write_jsonl
from safetensors.torch import load_file

import vlft
from vlft.checkpoints.runs import find_checkpoint
from vlft.settings import to_json

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def small_config(case, tmp_path: Path) -> vlft.SftConfig:
    """Rows of one and of three samples, text alone among them, the aligner trained."""
    return vlft.SftConfig(
        model=str(case.folder),
        dataset=(str(write_jsonl(tmp_path / "train.jsonl", make_rows(10, case))),),
        **case.settings,
        image_root=GOLDEN / "images",
        val_ratio=0.2,
        output_dir=tmp_path / "output",
        batch_size=3,
        num_train_epochs=1,
        learning_rate=1e-2,
        train_aligner=True,
        show_sample=False,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(
    config: vlft.SftConfig, home: Path, before=None, count: int = 2, **variables: str
) -> list:
    """Starts the processes of a run as torchrun does."""
    home.mkdir(exist_ok=True)
    file = home / "settings.json"
    # Only what was asked for: a resumed run has its settings.
    usual = to_json(vlft.SftConfig())
    asked = {name: value for name, value in to_json(config).items() if value != usual[name]}
    file.write_text(json.dumps(asked))
    # These two are not settings of a run, which a file may hold.
    flags = [] if config.resume is None else ["--resume", str(config.resume)]
    flags += ["--overwrite"] if config.overwrite else []
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    return [
        subprocesses.start(
            ["sft", "--config", str(file), *flags],
            home / f"errors-{index}.txt",
            before,
            **shared,
            **variables,
            RANK=str(index),
            LOCAL_RANK=str(index),
        )
        for index in range(count)
    ]


def finish(processes: list, home: Path) -> list[int]:
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(home.glob("errors-*.txt"))]
    assert all("Traceback" not in text for text in errors), errors
    assert None not in codes, (codes, errors)
    return codes


def run_of(config: vlft.SftConfig) -> Path:
    (run,) = config.output_dir.glob("*/v*")
    return run


def metrics(run: Path, name: str) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "adapter_model.safetensors")


def with_large_epsilon(make_optimizer):
    """AdamW whose step is proportional to a gradient far below the others.

    With its usual epsilon it makes a full step of a gradient that is nothing but rounding: of a
    LoRA A, whose gradient is zero until B has moved, one such number has moved by 2e-3 in one
    process and not in two.
    """

    def make(*arguments):
        optimizer = make_optimizer(*arguments)
        for group in optimizer.param_groups:
            group["eps"] = 1e-3
        return optimizer

    return make


def rehearse_on_the_cpu() -> None:
    """Tries the longest row before step one, as on a GPU; steps as ``with_large_epsilon``."""
    from vlft.training import run
    from vlft.training.autotune import try_longest_row

    train = run.train

    def train_after_a_rehearsal(job, *rest):
        try_longest_row(job)
        return train(job, *rest)

    run.train = train_after_a_rehearsal
    run.make_optimizer = with_large_epsilon(run.make_optimizer)
