"""A thread prepares the rows of the next step, and a run ends in the same bits as without it."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl
from safetensors.torch import load_file

import vlft
from vlft.data.store import Store
from vlft.errors import DataError
from vlft.training import ahead, loop
from vlft.training.rows import Row


@pytest.fixture
def config(tmp_path):
    """Six steps of two samples, an evaluation after each."""
    return vlft.SftConfig(
        model=str(SIGLIP.folder), dataset=(str(write_jsonl(tmp_path / "t.jsonl", make_rows(14))),),
        image_root=GOLDEN / "images", val_ratio=0.15, output_dir=tmp_path / "output",
        batch_size=2, num_train_epochs=1, eval_steps=1, lora_dropout=0.1, show_sample=False,
    )  # fmt: skip


def adapter(result):
    return load_file(result.checkpoint / "adapter_model.safetensors")


def test_same_bits_as_without_the_thread(config, monkeypatch, tmp_path):
    found = adapter(vlft.sft(config))

    def fails(*_args):
        raise DataError("not now")

    # What the thread has not made is made by the main thread, as if there were none.
    monkeypatch.setattr(ahead, "_prepare", fails)
    expected = adapter(vlft.sft(config))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_main_thread_encodes_no_training_sample(config, monkeypatch):
    """But of the first step and of validation, which come before."""
    threads: dict[int, str] = {}
    original = ahead.own_rows

    def watched(job, data, plans):
        threads[plans[0].members[0]] = threading.current_thread().name
        return original(job, data, plans)

    monkeypatch.setattr(ahead, "own_rows", watched)
    result = vlft.sft(config)
    assert result.step == len(threads)
    assert all(name.startswith("vlft-rows") for name in threads.values())
    assert not any(t.name.startswith("vlft-rows") for t in threading.enumerate())


def test_no_step_beyond_the_last_is_prepared(config, monkeypatch):
    numbers = []
    original = ahead._prepare

    def prepare(job, number):
        numbers.append(number)
        return original(job, number)

    monkeypatch.setattr(ahead, "_prepare", prepare)
    assert numbers == list(range(vlft.sft(config).step))


def test_an_error_of_the_thread_is_that_of_the_step(config, monkeypatch):
    """It comes when the rows are needed, from the main thread, and not before."""
    taken = []
    original = loop.take_step

    def take_step(job, plans):
        found = original(job, plans)
        taken.append(1)
        return found

    def encode(self, number):
        if len(taken) >= 2:
            raise DataError("the data file has changed")
        return right(self, number)

    right = Store._encode
    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr(Store, "_encode", encode)
    monkeypatch.setattr("vlft.data.store.SAMPLES_KEPT", 1)
    with pytest.raises(DataError, match="the data file has changed"):
        vlft.sft(config)
    assert len(taken) == 2


def test_the_host_waits_once_for_the_losses_of_a_step(config, monkeypatch):
    waits = []
    original, item = loop.take_gradients, torch.Tensor.item

    def counted(tensor):
        waits.append(1)
        return item(tensor)

    def take_gradients(job, plans):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "item", counted)
            return original(job, plans)

    monkeypatch.setattr(loop, "take_gradients", take_gradients)
    vlft.sft(config)
    assert not waits


def test_all_tensors_of_a_row_are_pinned_for_a_gpu(config, monkeypatch):
    seen, rows = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: seen.append(t.shape) or t.clone())
    original = ahead._prepare

    def prepare(job, number):
        plans, made = original(job, number)
        rows.extend(row.pinned() for row in made)
        return plans, made

    monkeypatch.setattr(ahead, "_prepare", prepare)
    vlft.sft(config)
    assert all(isinstance(row, Row) and row.images is not None for row in rows)
    # The batch has eight tensors, its codes five; the features are one, but of text alone.
    assert len(seen) == sum(8 + 5 + len(row.images.inputs) for row in rows)
