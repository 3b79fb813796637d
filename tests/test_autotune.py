"""The longest row is tried before step one, and trying changes nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, make_rows, only_siglip, write_jsonl

import vlft
from vlft.errors import VlftError
from vlft.training import autotune as autotune_module
from vlft.training import longest, run
from vlft.training.autotune import (
    _fitting_tokens,
    _largest,
    autotune,
    try_longest_row,
)
from vlft.training.longest import bounding_row, longest_row


@pytest.fixture
def before_step_one(case, tmp_path, monkeypatch):
    """A function that starts a run and calls another with its job instead of training."""
    config = vlft.SftConfig(
        model=str(case.folder),
        dataset=(str(write_jsonl(tmp_path / "train.jsonl", make_rows(10, case))),),
        **case.settings,
        image_root=GOLDEN / "images",
        output_dir=tmp_path / "output",
        batch_size=9,
        lora_dropout=0.1,
        show_sample=False,
    )

    def start(work):
        def train(job, position, *_):
            work(job)
            return position, None

        monkeypatch.setattr(run, "train", train)
        vlft.sft(config)

    return start


@only_siglip
def test_it_is_the_longest_of_the_epoch(before_step_one):
    @before_step_one
    def _work(job):
        steps = job.planner.schedule.epoch(0)
        packer = dataclasses.replace(job.planner.packer, tokens_per_row=150)
        lengths = [
            len(row) for indices in steps for row in packer.rows([job.train[i] for i in indices])
        ]
        assert len(longest_row(job, len(steps), 150)) == max(lengths)
        assert len(longest_row(job, len(steps), 4096)) > max(lengths)


@pytest.mark.parametrize("limit", [60, 150, 300, 4096])
def test_no_row_of_the_run_exceeds_the_bounding_row(before_step_one, monkeypatch, limit):
    monkeypatch.setattr(longest, "FEW_SAMPLES", 3)

    @before_step_one
    def _work(job):
        found = len(bounding_row(job, limit))
        steps = job.options.total_steps
        of_run = len(longest_row(job, steps, limit))
        of_samples = max(len(sample) for sample in job.train)
        assert of_run <= found or found == len(longest_row(job, steps, 10**9))
        assert found < max(limit, of_samples) + of_samples
        monkeypatch.setattr(longest, "MOST_ENCODED", 0)
        assert limit > 60 or bounding_row(job, limit) is None


@only_siglip
def test_of_many_samples_few_are_encoded(before_step_one, monkeypatch):
    """The others only if the row of some does not fit."""
    monkeypatch.setattr(longest, "FEW_SAMPLES", 3)
    fits = [True]
    original = autotune_module.row_loss

    def row_loss(job, row):
        if not fits.pop(0):
            raise torch.OutOfMemoryError
        return original(job, row)

    monkeypatch.setattr(autotune_module, "row_loss", row_loss)

    @before_step_one
    def _work(job):
        asked = []
        job.planner.longest_row = lambda steps: (
            asked.append(steps) or type(job.planner).longest_row(job.planner, steps)
        )
        try_longest_row(job)
        assert (asked, fits) == ([], [])
        fits[:] = [False, True]
        try_longest_row(job)
        assert (asked, fits) == ([job.options.total_steps], [])


def test_it_leaves_no_trace(before_step_one):
    @before_step_one
    def _work(job):
        before = torch.get_rng_state()
        encoded = job.images.encoded
        try_longest_row(job)
        assert torch.equal(torch.get_rng_state(), before)
        assert job.images.encoded == encoded
        assert all(parameter.grad is None for parameter in job.backend.model.parameters())
        assert not job.backend.optimizer.state


@only_siglip
def test_what_does_not_fit_is_said_before_step_one(before_step_one, monkeypatch):
    def row_loss(_job, _row):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(autotune_module, "row_loss", row_loss)
    with pytest.raises(VlftError, match=r"out of memory with a row of [0-9]+ tokens"):
        before_step_one(try_longest_row)


@only_siglip
def test_auto_takes_the_longest_rows_that_fit(before_step_one, monkeypatch):
    """A device that takes 200 tokens, of rows that could have more."""
    monkeypatch.setattr("vlft.training.autotune.FEWEST_TOKENS", 64)
    original = autotune_module.row_loss
    tried = []

    def row_loss(job, row):
        tried.append(len(row))
        if len(row) > 200:
            raise torch.OutOfMemoryError
        return original(job, row)

    monkeypatch.setattr(autotune_module, "row_loss", row_loss)

    @before_step_one
    def _work(job):
        found = _fitting_tokens(job)
        assert len(longest_row(job, job.planner.schedule.steps_per_epoch, found)) <= 200

    assert max(tried) > 200


@only_siglip
@pytest.mark.parametrize("room", [100, 100_000])
def test_checkpointing_is_left_out_where_there_is_room(before_step_one, monkeypatch, room):
    """A device that takes longer rows only if layers compute again."""
    original = autotune_module.row_loss

    def row_loss(job, row):
        if not job.backend.model.is_gradient_checkpointing and len(row) > room:
            raise torch.OutOfMemoryError
        return original(job, row)

    monkeypatch.setattr(autotune_module, "row_loss", row_loss)

    @before_step_one
    def _work(job):
        config = vlft.SftConfig(dataset=("x",), tokens_per_microbatch=150)
        found, _ = autotune(config, job)
        assert found.gradient_checkpointing == (room == 100)
        assert job.backend.model.is_gradient_checkpointing == (room == 100)
        try_longest_row(job)
        # What the user says is not tried.
        given = replace(config, gradient_checkpointing=False)
        assert autotune(given, job)[0] == given


@pytest.mark.parametrize("limit", [10, 64, 100, 129, 700, 5000])
@pytest.mark.parametrize("high", [64, 100, 1000])
def test_largest(limit, high):
    found = _largest(lambda number: number <= limit, 64, high)
    best = min(max(limit, 64), high)
    assert best / 1.26 <= found <= best


def test_memory_of_other_processes_counts(monkeypatch):
    """Of 80 GiB 30 are another process's, 10 this one's cache; at its peak this one held 40."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (40, 80))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 10)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 40)
    assert autotune_module._peak_share() == pytest.approx(70 / 80)
