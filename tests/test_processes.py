"""Several processes compute what one does, and one resumes where two have stopped."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import GOLDEN, SIGLIP, VL2_NOAUX, only_siglip
from launched import adapter, finish, launch, metrics, rehearse_on_the_cpu, run_of, small_config
from safetensors.torch import load_file
from tolerances import assert_close

import vlft
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.runs import find_checkpoint
from vlft.distributed import SINGLE
from vlft.errors import CollectedError, ConfigError, DataError, StoppedError, VlftError
from vlft.training.accelerator import start_backend


@pytest.fixture
def config(case, tmp_path):
    return small_config(case, tmp_path)


def as_fsdp() -> None:
    """Makes Accelerate shard the model on the CPU, which it otherwise does on GPUs only."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from vlft.training import accelerator as starting

    make = starting._accelerator

    def make_sharding(config, **kwargs):
        accelerator = make(config, **kwargs)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        assert accelerator.is_fsdp2
        return accelerator

    starting._accelerator = make_sharding
    rehearse_on_the_cpu()


@pytest.mark.parametrize("case", [SIGLIP, VL2_NOAUX], indirect=True, ids=str)
def test_two_processes_are_one(config, tmp_path, large_epsilon):
    """Same losses, gradient norms and adapter; only rank 0 writes and prints."""
    alone = vlft.sft(dataclasses.replace(config, output_dir=tmp_path / "alone")).run
    assert finish(launch(config, tmp_path / "two", rehearse_on_the_cpu), tmp_path / "two") == [0, 0]
    run = run_of(config)
    for name in ("loss", "val_loss"):
        assert_close(metrics(run, name), metrics(alone, name), "run losses")
    assert_close(metrics(run, "grad_norm"), metrics(alone, "grad_norm"), "run gradient norms")
    assert len(metrics(run, "loss")) == 3
    assert_close(adapter(run), adapter(alone), "run weights")
    state = load_file(find_checkpoint(run) / "state" / "state.safetensors")
    assert {name for name in state if name.startswith("rng.")} == {"rng.0.cpu", "rng.1.cpu"}
    spoken, silent = ((tmp_path / "two" / f"errors-{i}.txt").read_text() for i in range(2))
    assert "step 3/3" in spoken
    assert not silent
    assert not list(run.glob(".*"))


@only_siglip
def test_sharded_weights_are_one_model(config, tmp_path, large_epsilon):
    """FSDP2 gives the losses and adapter of one process, and either resumes the other's run."""
    config = dataclasses.replace(config, train_aligner=False, num_train_epochs=2, save_steps=3)
    alone = vlft.sft(dataclasses.replace(config, output_dir=tmp_path / "alone")).run
    home = tmp_path / "two"
    assert finish(launch(config, home, as_fsdp), home) == [0, 0]
    run = run_of(config)
    assert "the longest row of the run" in (home / "errors-0.txt").read_text()
    assert_close(metrics(run, "loss"), metrics(alone, "loss"), "run losses")
    assert_close(metrics(run, "grad_norm"), metrics(alone, "grad_norm"), "run gradient norms")
    assert_close(adapter(run), adapter(alone), "run weights")
    half = vlft.SftConfig(resume=run / "checkpoint-3", overwrite=True)
    assert vlft.sft(half).finished
    assert_close(metrics(run, "loss"), metrics(alone, "loss"), "run losses")
    # And back: two sharded processes resume the run of one.
    again = home / "again"
    assert finish(launch(half, again, as_fsdp), again) == [0, 0]
    assert_close(metrics(run, "loss"), metrics(alone, "loss"), "run losses")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", "MULTI_GPU"),
        ("fsdp", "FSDP"),
        ("zero2", "DEEPSPEED"),
        ("zero3", "DEEPSPEED"),
    ],
)
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
        ({"ACCELERATE_USE_FSDP": "true"}, "found fsdp_version: 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "found FSDP on the CPU"),
    ],
)
def test_ways_to_launch_that_are_not_known(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    placement = Placement(torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match=f"accelerate launch, distributed_type: FSDP: {message}"):
        start_backend(vlft.SftConfig(), placement)


@only_siglip
def test_one_process_goes_on_where_two_were_stopped(config, tmp_path):
    """The order of data depends on the seed alone, so that losses are those of an uncut run."""
    longer = dataclasses.replace(config, num_train_epochs=6, save_steps=3)
    alone = vlft.sft(dataclasses.replace(longer, output_dir=tmp_path / "alone", save_steps=100)).run
    home = tmp_path / "two"
    processes = launch(longer, home)
    deadline = time.monotonic() + 120
    while not list(longer.output_dir.glob("*/v*/checkpoint-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # A signal to one rank stops all.
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes, home) == [130, 130]
    run = run_of(longer)
    assert 1 <= len(metrics(run, "loss")) < 18
    assert vlft.sft(vlft.SftConfig(resume=run)).finished
    assert_close(metrics(run, "loss"), metrics(alone, "loss"), "run losses")


@only_siglip
def test_an_error_is_said_once(config, tmp_path):
    bad = dataclasses.replace(config, dataset=(str(tmp_path / "none.jsonl"),))
    assert finish(launch(bad, tmp_path / "two"), tmp_path / "two") == [2, 2]
    texts = [(tmp_path / "two" / f"errors-{index}.txt").read_text() for index in range(2)]
    assert "none.jsonl" in texts[0]
    assert not texts[1]


def replacing_an_image() -> None:
    """Replaces an image that rank 1 encodes, after all ranks have checked the data."""
    from vlft.training import images as training_images
    from vlft.vision import batches

    batches.PIXELS_AT_ONCE = 1
    fill = training_images.fill

    def fill_after_a_change(plan, model, processor, images, world):
        if world.is_rank_zero:
            images[1].path.write_bytes(b"another image")
        return fill(plan, model, processor, images, world)

    training_images.fill = fill_after_a_change


@only_siglip
def test_an_image_that_one_rank_cannot_read_ends_all(config, tmp_path):
    config = dataclasses.replace(
        config, image_root=shutil.copytree(GOLDEN / "images", tmp_path / "images")
    )
    home = tmp_path / "two"
    assert finish(launch(config, home, replacing_an_image), home) == [2, 2]
    texts = [(home / f"errors-{index}.txt").read_text() for index in range(2)]
    assert "the image has changed since the data was checked" in texts[0]
    assert not texts[1]


class OwnError(DataError):
    """An error with arguments and an attribute of its own."""

    def __init__(self, columns: list[str]) -> None:
        super().__init__(f"found {columns}", place="a.csv", hint="name them")
        self.columns = columns


@pytest.mark.parametrize(
    "error",
    [
        VlftError("found", place="a.png", hint="put it back"),
        StoppedError(),
        CollectedError([ConfigError("a"), OwnError(["b"])]),
        OwnError(["b", "c"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error):
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), other.args) == (str(error), error.args)
        assert other.exit_code == error.exit_code
        assert repr(vars(other)) == repr(vars(error))


def test_a_single_process_communicates_with_nobody():
    found = SINGLE.all_reduce(1.5, 2.0), SINGLE.on_rank_zero(lambda: "a"), SINGLE.all_gather(3)
    assert found == ((1.5, 2.0), "a", [3])
    SINGLE.barrier()
