"""Several processes compute what one does, and one goes on where two have stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import subprocesses
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import GOLDEN, SIGLIP, VL2_NOAUX, make_rows, only_siglip, write_jsonl
from safetensors.torch import load_file

import vlft
from vlft.checkpoints.runs import find_checkpoint
from vlft.errors import ConfigError
from vlft.processes import ALONE
from vlft.settings import to_json
from vlft.training.setup import check_launch


@pytest.fixture
def config(case, tmp_path):
    """Rows of one and of three samples, text alone among them, the aligner trained."""
    return vlft.SftConfig(
        model=str(case.folder),
        dataset=(str(write_jsonl(tmp_path / "train.jsonl", make_rows(10))),),
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


def as_fsdp() -> None:
    """Makes Accelerate shard the model on the CPU, which it does of itself on GPUs alone."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from vlft.training import run

    make = run.make_accelerator

    def make_sharding(config, placement):
        accelerator = make(config, placement)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        assert accelerator.is_fsdp2
        return accelerator

    run.make_accelerator = make_sharding
    rehearse_on_the_cpu()


def rehearse_on_the_cpu() -> None:
    """Tries the longest row before step one, as on a GPU."""
    from vlft.training import run
    from vlft.training.rehearse import rehearse

    train = run.train

    def train_after_a_rehearsal(job, position):
        rehearse(job)
        return train(job, position)

    run.train = train_after_a_rehearsal


def launch(config: vlft.SftConfig, home: Path, before=None, count: int = 2) -> list:
    """Starts the processes of a run as torchrun does."""
    home.mkdir(exist_ok=True)
    file = home / "settings.json"
    # Only what was asked for: a resumed run has its settings.
    usual = to_json(vlft.SftConfig())
    asked = {name: value for name, value in to_json(config).items() if value != usual[name]}
    file.write_text(json.dumps(asked))
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
            ["sft", "--config", str(file)],
            home / f"errors-{index}.txt",
            before,
            **shared,
            RANK=str(index),
            LOCAL_RANK=str(index),
        )
        for index in range(count)
    ]


def finish(processes: list, home: Path) -> list[int]:
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(home.glob("errors-*.txt"))]
    assert all("Traceback" not in text for text in errors), errors
    return codes


def run_of(config: vlft.SftConfig) -> Path:
    (run,) = config.output_dir.glob("*/v*")
    return run


def metrics(run: Path, name: str) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "adapter_model.safetensors")


@pytest.mark.parametrize("case", [SIGLIP, VL2_NOAUX], indirect=True, ids=str)
def test_two_processes_are_one(config, tmp_path):
    """Losses, gradients' norms and the adapter; one writer, pictures divided, words said once."""
    alone = vlft.sft(dataclasses.replace(config, output_dir=tmp_path / "alone")).run
    assert finish(launch(config, tmp_path / "two", rehearse_on_the_cpu), tmp_path / "two") == [0, 0]
    run = run_of(config)
    for name in ("loss", "val_loss", "grad_norm"):
        assert metrics(run, name) == pytest.approx(metrics(alone, name), rel=1e-4), name
    assert len(metrics(run, "loss")) == 3
    expected = adapter(alone)
    for name, tensor in adapter(run).items():
        assert (tensor - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name
    state = load_file(find_checkpoint(run) / "state" / "state.safetensors")
    assert {name for name in state if name.startswith("rng.")} == {"rng.0.cpu", "rng.1.cpu"}
    spoken, silent = ((tmp_path / "two" / f"errors-{i}.txt").read_text() for i in range(2))
    assert "step 3/3" in spoken
    assert not silent
    assert not list(run.glob(".*"))


@only_siglip
def test_sharded_weights_are_one_model(config, tmp_path):
    """FSDP2: the losses of one process, a whole adapter, a state that one process goes on from."""
    config = dataclasses.replace(config, train_aligner=False, num_train_epochs=2, save_steps=3)
    alone = vlft.sft(dataclasses.replace(config, output_dir=tmp_path / "alone")).run
    home = tmp_path / "two"
    assert finish(launch(config, home, as_fsdp), home) == [0, 0]
    run = run_of(config)
    assert "the longest row of the run" in (home / "errors-0.txt").read_text()
    assert metrics(run, "loss") == pytest.approx(metrics(alone, "loss"), rel=1e-4)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(alone, "grad_norm"), rel=1e-4)
    expected = adapter(alone)
    assert adapter(run).keys() == expected.keys()
    for name, tensor in adapter(run).items():
        assert (tensor - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name
    half = vlft.SftConfig(resume=run / "checkpoint-3", overwrite=True)
    assert vlft.sft(half).finished
    assert metrics(run, "loss") == pytest.approx(metrics(alone, "loss"), rel=1e-3)
    # And back: two processes, sharded, go on from where one was.
    again = home / "again"
    assert finish(launch(half, again, as_fsdp), again) == [0, 0]
    assert metrics(run, "loss") == pytest.approx(metrics(alone, "loss"), rel=1e-3)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_the_configurations_of_the_docs_are_accelerates(name, kind):
    path = Path(__file__).parent.parent / "docs" / "accelerate" / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert (found.distributed_type, found.num_processes) == (kind, 2)
    assert f"accelerate launch --config_file docs/accelerate/{name}.yaml" in (
        path.parent.parent / "scale.md"
    ).read_text("utf-8")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "found DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "found fsdp_version: 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "found FSDP on the CPU"),
    ],
)
def test_ways_to_launch_that_are_not_known(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"accelerate launch: {message}"):
        check_launch(torch.device("cpu"))


@only_siglip
def test_one_process_goes_on_where_two_were_stopped(config, tmp_path):
    """The order of the data is the seed's, so that the losses are those of a whole run."""
    longer = dataclasses.replace(config, num_train_epochs=6, save_steps=3)
    alone = vlft.sft(dataclasses.replace(longer, output_dir=tmp_path / "alone", save_steps=100)).run
    home = tmp_path / "two"
    processes = launch(longer, home)
    deadline = time.monotonic() + 120
    while not list(longer.output_dir.glob("*/v*/checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # One is asked, all stop.
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes, home) == [130, 130]
    run = run_of(longer)
    assert 1 <= len(metrics(run, "loss")) < 18
    assert vlft.sft(vlft.SftConfig(resume=run)).finished
    assert metrics(run, "loss") == pytest.approx(metrics(alone, "loss"), rel=1e-3)


@only_siglip
def test_an_error_is_said_once(config, tmp_path):
    bad = dataclasses.replace(config, dataset=(str(tmp_path / "none.jsonl"),))
    assert finish(launch(bad, tmp_path / "two"), tmp_path / "two") == [2, 2]
    texts = [(tmp_path / "two" / f"errors-{index}.txt").read_text() for index in range(2)]
    assert "none.jsonl" in texts[0]
    assert not texts[1]


def test_alone_nothing_is_asked_of_others():
    assert (ALONE.sum(1.5, 2.0), ALONE.same("a"), ALONE.all(3)) == ((1.5, 2.0), "a", [3])
    ALONE.wait()
