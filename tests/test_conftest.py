"""The suite gives the same results on every machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import only_siglip, without_gpu

from vlft.checkpoints.placement import resolve_placement

ASKS = "import os; print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"


class TestGpusAreHidden:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """A machine with a GPU."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def test_from_every_test(self):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert not torch.cuda.is_available()

    @only_siglip
    def test_auto_stays_on_the_cpu_in_float32(self, gpu, folder):
        auto = {"dtype": "auto", "device": "auto", "quantize": "none"}
        assert resolve_placement(**auto).device.type == "cuda"
        with without_gpu():
            placement = resolve_placement(**auto)
        assert (placement.device.type, placement.dtype) == ("cpu", torch.float32)
        assert torch.cuda.is_available()

    def test_from_processes(self, gpu):
        command = [sys.executable, "-c", ASKS]
        with without_gpu():
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "''\n"

    @pytest.mark.cuda
    def test_not_from_those_that_need_one(self, request):
        assert request.config.getoption("--device") == "cpu" or torch.cuda.is_available()
