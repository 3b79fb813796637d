"""Device and dtype that ``auto`` means, and what is said where torch cannot use a GPU."""

from __future__ import annotations

import ast
import math
import os
import sys
from pathlib import Path

import pytest
import torch

import vlft
from vlft import gpus, locks
from vlft.checkpoints import placement
from vlft.checkpoints.placement import resolve_placement
from vlft.cli import app
from vlft.errors import ConfigError
from vlft.settings import check
from vlft.training import progress
from vlft.vision import cache_plan

AUTO = {"dtype": "auto", "device": "auto", "quantize": "none"}


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends a GPU, with or without bfloat16."""

    def pretend(native: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

        def supported(including_emulation=True):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

    return pretend


@pytest.fixture
def driver(monkeypatch):
    """An NVIDIA GPU with its driver, which this torch cannot use."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(placement.Path, "glob", lambda _folder, _pattern: iter(["/dev/nvidia0"]))


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_the_dtype_is_what_the_gpu_computes_with(gpu, native, dtype):
    """Also where config.json says float16: it is of the files, not of the GPU."""
    gpu(native)
    found = resolve_placement(**AUTO)
    assert (found.device.type, found.dtype) == ("cuda", dtype)


def test_emulated_bfloat16_is_warned_of(gpu, capfd):
    gpu(False)
    assert resolve_placement(**{**AUTO, "dtype": "bfloat16"}).dtype == torch.bfloat16
    assert "only emulates bfloat16" in capfd.readouterr().err


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_not_passed_over(driver, device):
    """Otherwise the run would be done on the CPU, in float32, and take weeks."""
    with pytest.raises(ConfigError, match="there is an NVIDIA GPU, but torch") as caught:
        resolve_placement(**{**AUTO, "device": device})
    assert "pip install torch --index-url https://" in caught.value.hint
    assert "--device cpu" in caught.value.hint


@pytest.mark.parametrize("built", [None, "13.0"])
def test_it_says_why(driver, monkeypatch, built):
    monkeypatch.setattr(torch.version, "cuda", built)
    reason = "has no CUDA" if built is None else "is built for CUDA 13.0, which the driver"
    with pytest.raises(ConfigError, match=reason):
        resolve_placement(**AUTO)


def test_the_cpu_may_be_asked_for(driver):
    assert resolve_placement(**{**AUTO, "device": "cpu"}).device.type == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_gpu_is_not_missed(driver, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert resolve_placement(**AUTO).device.type == "cpu"


def test_mps_is_refused_by_name():
    """The golden numbers have not been compared on Apple's GPUs."""
    with pytest.raises(ConfigError, match="--device: found 'mps'") as caught:
        check(vlft.SftConfig(device="mps"))
    assert caught.value.hint == "allowed: auto, cpu, cuda"


def test_no_gpu_at_all():
    with pytest.raises(ConfigError, match="found no usable GPU"):
        resolve_placement(**{**AUTO, "device": "cuda"})


def test_kernels_are_not_chosen_by_a_search_per_shape():
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    resolve_placement(**{**AUTO, "device": "cpu"})
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", gpus.GPUS)
def test_every_named_gpu_has_its_abilities(name):
    line = gpus.abilities(name)
    assert ("float16 with a gradient scaler" in line) == (name in ("t4", "v100"))
    assert "torch for CUDA 1" in line
    assert not gpus.abilities("24GB")


UNIX_ONLY = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty"}


@pytest.mark.parametrize("path", sorted(Path(vlft.__file__).parent.rglob("*.py")), ids=str)
def test_no_module_needs_unix_to_be_imported(path):
    """A statement of the module itself, outside of ``try``, would fail on Windows."""
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in statement.names} | {getattr(statement, "module", "")}
            assert not names & UNIX_ONLY
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr):
            assert "os.sysconf" not in ast.unparse(statement)


def test_without_what_unix_alone_has(monkeypatch, tmp_path):
    """Windows has none of it; nor is any needed to train."""
    monkeypatch.setattr(locks, "fcntl", None)
    with locks.locked(tmp_path / "absent" / "lock", tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr("os.sysconf")
    assert progress._peak_memory() == 0
    assert cache_plan._free_memory() == math.inf


@pytest.mark.parametrize("given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}])
def test_segments_grow_unless_the_user_decides(monkeypatch, given):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    app._let_segments_grow()
    expected = None if given else "expandable_segments:True"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
