"""DeepSpeed's ZeRO: two processes that share the state compute what one does."""

from __future__ import annotations

import dataclasses
import math
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import SIGLIP, VL2_NOAUX, only_siglip
from launched import adapter, finish, launch, metrics, rehearse_on_the_cpu, run_of, small_config
from safetensors.torch import load_file
from tolerances import assert_close

import vlft
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.runs import find_checkpoint
from vlft.distributed import SINGLE
from vlft.errors import ConfigError
from vlft.training import deepspeed
from vlft.vision.cache_plan import CachePlan

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture
def config(case, tmp_path):
    """DoRA trains vectors besides matrices, so that the optimiser has two parameter groups."""
    return dataclasses.replace(
        small_config(case, tmp_path),
        train_aligner=False,
        use_dora=True,
        gradient_checkpointing=True,
    )


def with_deepspeed() -> None:
    """Makes ZeRO-3 release every gathered weight at once, and tries the longest row as on a GPU."""
    import deepspeed

    from vlft.training import deepspeed as seam
    from vlft.training import loss

    # Small, so that ranks have different numbers of chunks.
    loss.CHUNK["cpu"] = 8
    # Communicate by Gloo: DeepSpeed's own kernel is compiled for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    make = seam.make_plugin

    def make_sharding(max_grad_norm):
        plugin = make(max_grad_norm)
        names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        for name in names:
            plugin.deepspeed_config["zero_optimization"][f"stage3_{name}"] = 0
        return plugin

    seam.make_plugin = make_sharding
    rehearse_on_the_cpu()


def with_infinite_gradients() -> None:
    """Makes the gradients of one rank infinite."""
    from vlft.training.deepspeed import DeepSpeedBackend

    with_deepspeed()
    backward = DeepSpeedBackend.backward

    def backward_of_infinity(backend, loss, *, last):
        backward(backend, loss * (math.inf if os.environ["RANK"] == "1" else 1), last=last)

    DeepSpeedBackend.backward = backward_of_infinity


def asking_for(stage: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}


def moments(run: Path) -> dict[str, torch.Tensor]:
    state = load_file(find_checkpoint(run) / "state" / "state.safetensors")
    return {name: tensor for name, tensor in state.items() if not name.startswith("rng.")}


@needs_deepspeed
@pytest.mark.parametrize("case", [SIGLIP, VL2_NOAUX], indirect=True, ids=str)
@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_is_one_model(config, tmp_path, large_epsilon, stage):
    """Same losses, adapter and moments as one process, and either resumes the other's run."""
    clipped = float(stage == "3")
    config = dataclasses.replace(config, num_train_epochs=2, save_steps=3, max_grad_norm=clipped)
    alone = vlft.sft(dataclasses.replace(config, output_dir=tmp_path / "alone")).run
    home = tmp_path / "two"
    assert finish(launch(config, home, with_deepspeed, **asking_for(stage)), home) == [0, 0]
    run = run_of(config)
    assert "the longest row of the run" in (home / "errors-0.txt").read_text()
    for name in ("loss", "val_loss"):
        assert_close(metrics(run, name), metrics(alone, name), "run losses")
    assert_close(metrics(run, "grad_norm"), metrics(alone, "grad_norm"), "run gradient norms")
    half = vlft.SftConfig(resume=run / "checkpoint-3", overwrite=True)
    assert_close(adapter(run), adapter(alone), "run weights")
    assert_close(moments(run), moments(alone), "run weights")
    assert vlft.sft(half).finished
    assert_close(metrics(run, "loss"), metrics(alone, "loss"), "run losses")
    again = home / "again"
    assert finish(launch(half, again, with_deepspeed, **asking_for(stage)), again) == [0, 0]
    assert_close(metrics(run, "loss"), metrics(alone, "loss"), "run losses")


@only_siglip
@needs_deepspeed
@pytest.mark.parametrize("stage", ["2", "3"])
def test_gradients_that_are_not_finite_end_the_run(config, tmp_path, stage):
    home = tmp_path / "two"
    processes = launch(config, home, with_infinite_gradients, **asking_for(stage))
    assert finish(processes, home) == [1, 1]
    assert "the gradient norm is nan" in (home / "errors-0.txt").read_text()
    assert not list(run_of(config).glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("variable", "value", "changes", "message"),
    [
        ("ZERO_STAGE", "1", {}, "found zero_stage: 1; 2 and 3 are allowed"),
        ("CONFIG_FILE", "ds.json", {}, "found deepspeed_config_file: ds.json"),
        ("OFFLOAD_PARAM_DEVICE", "cpu", {}, "found offload_param_device: cpu; none is allowed"),
        ("ZERO_STAGE", "3", {"tuner": "full"}, "allowed with it is --tuner lora"),
        ("ZERO_STAGE", "3", {"quantize": "nf4"}, "allowed with it is --quantize none"),
        ("ZERO_STAGE", "2", {"dtype": "float16"}, "--dtype bfloat16 and float32"),
        ("ZERO_STAGE", "2", {"train_aligner": True}, "not go with --train-aligner"),
        ("ZERO_STAGE", "2", {"train_vision": True}, "not go with --train-vision"),
        ("ZERO_STAGE", "2", {"train_gen_head": True}, "not go with --train-gen-head"),
        ("ZERO_STAGE", "2", {"train_gen_aligner": True}, "not go with --train-gen-aligner"),
    ],
)
def test_what_does_not_go_with_deepspeed(monkeypatch, variable, value, changes, message):
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: name)
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{variable}", value)
    config = vlft.SftConfig(**changes)
    dtype = getattr(torch, config.dtype, torch.float32)
    with pytest.raises(ConfigError, match=message):
        deepspeed.check(config, Placement(torch.device("cuda"), dtype))


def test_deepspeed_is_not_installed(monkeypatch):
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)not installed.*pip install 'vlft\[deepspeed\]'"):
        deepspeed.check(vlft.SftConfig(), Placement(torch.device("cuda"), torch.float32))


def test_features_are_kept_with_zero_3():
    plan = CachePlan("off", "aligned", Path(), "as asked")
    backends = [
        deepspeed.DeepSpeedBackend(None, SINGLE, 1.0, stage, torch.float32) for stage in (2, 3)
    ]
    backends[0].check_cache(plan)
    with pytest.raises(ConfigError, match=r"--vision-cache: off \(as asked\); zero_stage: 3 needs"):
        backends[1].check_cache(plan)
    backends[0].check_cache(dataclasses.replace(plan, stage="codes"))
    with pytest.raises(ConfigError, match="response_images: zero_stage: 3 does not train drawing"):
        backends[1].check_cache(dataclasses.replace(plan, stage="codes"))
