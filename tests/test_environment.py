"""``vlft env``: what a report needs, and no secret."""

from __future__ import annotations

import json

import bitsandbytes.functional
import torch
from test_cli import run

import vlft
from vlft.cli import environment


def test_a_block_of_80_columns(monkeypatch, capfd):
    code, text, _ = run(monkeypatch, capfd, "env")
    lines = text.splitlines()
    assert code == 0
    assert lines[0] == lines[-1] == "```"
    assert max(map(len, lines)) <= 80
    assert f"vlft          {vlft.__version__}" in lines
    assert f"torch {torch.__version__}" in " ".join(text.split())


def test_json_holds_the_same(monkeypatch, capfd):
    code, text, _ = run(monkeypatch, capfd, "env", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["vlft"] == vlft.__version__
    assert {"python", "cpu", "packages", "gpus", "works", "caches"} < {*found}


def test_no_secret_and_no_home_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = environment.environment()
    assert "hf_secret" not in json.dumps(found)
    assert found["caches"] == ["~/cache/vlft", "empty"]
    assert "OMP_NUM_THREADS=1" in found["variables"]


def test_nf4_is_tried(monkeypatch):
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *_: torch.zeros(64, 64))
    assert "nf4 no, it reads other numbers than it stored" in environment._abilities()


def test_a_kernel_that_is_missing_is_said(monkeypatch):
    def quantize(*_args, **_settings):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", quantize)
    assert "nf4 no (RuntimeError: no kernel image)" in environment._abilities()
