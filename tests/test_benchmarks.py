"""The benchmarks that only a GPU gives a meaning run on the CPU too, on tiny models."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from tolerances import assert_close

import vlft
from benchmarks import arithmetic, attention, draw, fake, host, plan, step
from benchmarks.attention import random_row, varlen_plan
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.packing.attention import additive_mask
from vlft.planning.sizes import text_sizes


@pytest.fixture(autouse=True)
def _no_accelerator_stays():
    """A benchmark leaves its accelerator, which is of one precision, to the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


SHAPES = {"a.weight": (3, 5), "norm.weight": (4,), "norm.bias": (4,), "b.weight": (2, 2, 2)}


def test_fake_weights(tmp_path):
    from safetensors.torch import load_file

    fake.write_weights(tmp_path / "model.safetensors", SHAPES)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    assert found["norm.weight"].tolist() == [1] * 4
    assert found["norm.bias"].tolist() == [0] * 4
    assert 0.001 < found["a.weight"].float().std() < 0.1
    assert not torch.equal(found["a.weight"].flatten()[:8], found["b.weight"].flatten())


def test_fake_numbers_go_on_where_their_block_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "BLOCK", 8)
    assert [last - first for first, last in fake._cuts(21, 3)] == [5, 8, 8]


@pytest.mark.parametrize("name", sorted({fake.short_name(p) for p in fake.PUBLISHED}))
def test_a_fake_folder_is_the_published_model(tmp_path, monkeypatch, name):
    """Every tensor that the model has is written, and its tokenizer and images are usable."""
    written = {}
    monkeypatch.setattr(fake, "write_weights", lambda _path, shapes: written.update(shapes))
    fake.write_fake(name, tmp_path / "model", layers=1)
    folder = describe(tmp_path / "model")
    assert folder.processor().pixels.sizes((0, 0))
    assert folder.native_config()["text_config"]["num_hidden_layers"] == 1
    keys = folder.family.keys
    assert all(keys.is_unused(key) or keys.from_original(key) for key in written)
    assert not any(".layers.1." in key and "vision" not in key for key in written if "lang" in key)


def test_operations_are_those_that_torch_counts():
    """Forward and backward pass of a row, less what LoRA adds; attention is counted as it is."""
    folder = describe(fake.CHECKPOINTS / "deepseek-vl-siglip")
    model = load_model(folder, Placement(torch.device("cpu"), torch.float32))
    native = folder.native_config()
    built = step.with_lora(model, folder.family, native, folder.processor().pixels, (0, 0))
    samples = step.random_samples(step.WORKLOADS["q1"], built, 3)
    job = step.make_job(built, samples)
    step.encode_images(job, samples)
    plans = step.rows_of(job)
    counter = FlopCounterMode(display=False, custom_mapping=arithmetic.FORMULAS)
    with counter:
        step.take_step(job, plans)
    told = step.step_operations(text_sizes(native["text_config"]), job, plans)
    assert 0.75 < told / counter.get_total_flops() < 1.05


def test_varlen_sees_what_the_dense_mask_sees():
    """torch's kernel is on CUDA only; its sequences are computed one by one here."""
    row = random_row(1024)
    query, key, value = (torch.randn(1, 2, len(row), 8) for _ in range(3))
    keys, starts, ends = varlen_plan(row.segments)
    made = []
    for number in range(len(row.segments)):
        queries = query[:, :, starts[number] : starts[number + 1]]
        at = torch.tensor(keys[ends[number] : ends[number + 1]])
        mask = torch.ones(queries.shape[2], len(at), dtype=torch.bool)
        mask = mask.tril(len(at) - queries.shape[2])
        taken = key[:, :, at], value[:, :, at]
        made.append(F.scaled_dot_product_attention(queries, *taken, attn_mask=mask))
    mask = additive_mask(row.exit, torch.float32)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert_close(torch.cat(made, 2), expected, "layer")


@pytest.mark.parametrize("workload", ["q1", "q5", "mixed"])
def test_hardly_more_scores_are_computed_than_needed(workload):
    """On rows that a run packs, which have the system prompt in common."""
    assert 1 <= attention.score_ratio(workload) <= 1.1


def test_a_side_that_fails_is_told_and_the_others_run(tmp_path):
    options = ["--device", "cpu", "--tokens", "900", "--heads", "2x8", "x", "--repeats", "1"]
    output = ["--output", str(tmp_path / "out")]

    def wrong(*_args, **_kwargs):
        raise RuntimeError("no kernel found")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "tree_attention", wrong)
        attention.main([*options[:6], *options[7:], *output])
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["note"] for result in results] == ["", "", "RuntimeError: no kernel found"]
    assert results[0]["seconds"] > 0
    assert results[2]["seconds"] is None


def test_a_step_of_a_tiny_model(tmp_path, capsys, monkeypatch):
    # Three settings that take different paths through the code, and one that a CPU cannot run.
    # Compiled layers are left to tests/test_compiled.py, because compiling takes most of the time.
    chosen = [{}, {"quantize": "nf4", "targets": "ALL"}, {"attn": "eager"}, {"attn": "flex"}]
    monkeypatch.setattr(step, "VARIANTS", chosen)
    # The real measurement takes half a minute on a processor that emulates bfloat16.
    monkeypatch.setattr(step, "matrix_rate", lambda _device, _dtype: 1e9)
    options = ["--models", "1.3b", "--scale", "tiny", "--samples", "2", "--repeats", "1"]
    step.main([*options, "--device", "cpu", "--workloads", "q1", "--output", str(tmp_path / "o")])
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    # The benchmark leaves FlexAttention out on a CPU, where it has no backward pass.
    assert len(results) == 3
    assert all(result["note"] == "" and result["share"] > 0 for result in results)
    dense = next(result for result in results if result["attn"] == "eager")
    assert dense["loss"] == pytest.approx(results[0]["loss"], rel=2e-2)


def test_both_sides_of_drawing_draw_the_same(tmp_path):
    options = ["--scale", "tiny", "--batches", "1", "3", "--repeats", "1", "--device", "cpu"]
    draw.main([*options, "--output", str(tmp_path / "o")])
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert [(result["batch"], result["equal"]) for result in results] == [(1, 1.0), (3, 1.0)]


def test_the_host_of_a_small_step():
    """Most of its work is the other thread's."""
    found = host.run(argparse.Namespace(repeats=1, gpu_seconds=0.2), 4)
    assert 600 < found["tokens"] < 800
    assert 0 < found["ms"] < found["all_ms"]


def test_a_plan_is_measured_without_and_with_checkpointing():
    case = {"model": "deepseek-vl", "workload": "q1", "scale": "tiny", "dtype": "float32"}
    found = plan.run(argparse.Namespace(**case, device="cpu", samples=2))
    assert [one["checkpointing"] for one in found] == ["no", "yes"]
    without, with_it = (one["parts_mib"]["activations"] for one in found)
    assert with_it < without
    assert all(one["encoding_gib"] > 0 and one["step_gib"] > 0 for one in found)


def test_out_of_memory_takes_shorter_rows(tmp_path, monkeypatch):
    limits = []

    def run(_path, _case, _rate, limit):
        limits.append(limit)
        if len(limits) < 3:
            raise torch.OutOfMemoryError("full")
        return {"note": ""}

    monkeypatch.setattr(step, "run", run)
    case = vlft.SftConfig(device="cuda")
    assert step.attempt(tmp_path, case, 1.0) == {"note": ""}
    assert limits == [None, 4096, 2048]
