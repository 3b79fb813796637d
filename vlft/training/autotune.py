"""What fits into the GPU, before step one: the longest row, and what ``auto`` comes to.

A row is tried with all that a step does but the update; gradients and random numbers are as
before, so that a run with and without a rehearsal is the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch

from vlft import console
from vlft.errors import VlftError
from vlft.planning.memory import ENOUGH_TOKENS, SAFE_SHARE
from vlft.training import zero
from vlft.training.loop import backward
from vlft.training.setup import set_checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vlft.config import SftConfig
    from vlft.packing.prefix_tree import PackedBatch
    from vlft.training.job import Job

# Steps whose longest row stands for all while sizes are tried.
STEPS_TRIED = 32
FEWEST_TOKENS, MOST_TOKENS = 1024, 65_536


def rehearse(job: Job) -> None:
    """Runs the longest row of all epochs once.

    Raises:
        VlftError: it does not fit into memory.
    """
    row = longest_row(job, all_steps(job), job.packer.tokens_per_row)
    try_row(job, row)
    console.info(f"the longest row of the run, {len(row)} tokens, fits")


def settle(config: SftConfig, job: Job) -> SftConfig:
    """The settings with what ``auto`` comes to on this GPU; the model is set to it."""
    tokens, checkpointing = config.tokens_per_microbatch, config.gradient_checkpointing
    if checkpointing is None:
        checkpointing = needs_checkpointing(job, tokens or ENOUGH_TOKENS)
    if tokens is None:
        tokens = fitting_tokens(job)
    return replace(config, tokens_per_microbatch=tokens, gradient_checkpointing=checkpointing)


def needs_checkpointing(job: Job, tokens: int) -> bool:
    """Whether rows fit only if layers compute again what the backward pass needs.

    Left out where it can be: it takes a third of a step's arithmetic more. A sharded model keeps
    it, see ``fitting_tokens``.

    Args:
        job: see Job.
        tokens: most of a row that is to fit.
    """
    if job.world.sharded:
        return True
    row = longest_row(job, all_steps(job), tokens)
    set_checkpointing(job.model, on=False)
    needed = not all(job.world.all_gather(fits(job, row)))
    if needed:
        set_checkpointing(job.model, on=True)
    rows = f"rows of {tokens} tokens"
    found = f"on, {rows} do not fit without" if needed else f"off, {rows} fit without"
    console.info(f"gradient checkpointing: {found}")
    return needed


def fitting_tokens(job: Job) -> int:
    """The most tokens per row that the GPU takes, found by trying the run's own rows.

    Of a sharded model no process can try alone, and one whose memory is full would leave the
    others waiting: the usual number is taken.
    """
    if job.world.sharded:
        return job.packer.tokens_per_row
    steps = list(islice(job.schedule.epoch(0), STEPS_TRIED))
    most = len(longest_row(job, steps, MOST_TOKENS))

    def fit(tokens: int) -> bool:
        return fits(job, longest_row(job, steps, tokens))

    found = min(job.world.all_gather(largest(fit, FEWEST_TOKENS, min(most, MOST_TOKENS))))
    console.info(f"--tokens-per-microbatch auto: {found}")
    return found


def fits(job: Job, row: PackedBatch) -> bool:
    """Whether the GPU takes a row, and has room left for what varies from row to row."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        try_row(job, row)
    except VlftError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return False
    return not torch.cuda.is_available() or _used_share() < SAFE_SHARE


def all_steps(job: Job) -> list[list[int]]:
    """The steps of all epochs of the run."""
    epochs = -(-job.options.total_steps // job.schedule.steps_per_epoch)
    return [step for number in range(epochs) for step in job.schedule.epoch(number)]


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that fits, within a quarter of it; ``low`` if none does.

    Args:
        fits: whether a number does; if one does not, no larger one is asked for.
        low: asked first.
        high: never more than this.
    """
    number = low
    while number < high and fits(number):
        number *= 2
    if number >= high and fits(high):
        return high
    good, bad = max(low, number // 2), min(number, high)
    while bad > 1.25 * good:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def longest_row(job: Job, steps: Iterable[list[int]], tokens_per_row: int) -> PackedBatch:
    """The longest row of some steps."""
    packer = replace(job.packer, tokens_per_row=tokens_per_row)
    longest, chosen = 0, []
    for indices in steps:
        plan = packer.plan([job.train.outlines[index] for index in indices])[0]
        if plan.tokens > longest:
            longest, chosen = plan.tokens, [indices[index] for index in plan.members]
    return packer.row([job.train[index] for index in chosen])


def try_row(job: Job, row: PackedBatch) -> None:
    """Forward and backward of a row, beside all that a later row of a run meets; leaves no trace.

    There are gradients then, and the optimiser's moments.
    """
    device = job.accelerator.device
    encoded = job.images.encoded
    trained = [p for p in job.model.parameters() if p.requires_grad]
    # This process's part of each, if weights are sharded; a resumed run has its moments already.
    sizes = [getattr(p, "_local_tensor", p).numel() for p in trained]
    held = 0 if job.optimizer.state else 2 * sum(sizes)
    moments = torch.empty(held, dtype=torch.float32, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            job.objective.train()
            if job.world.zero_stage:
                backward(job, row, math.nan, travel=True)
                zero.forget_gradients(job.objective)
                return
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            # Each process tries for itself, unless all hold one model together.
            backward(job, row, 1.0, travel=job.world.sharded)
        finally:
            del moments
            job.optimizer.zero_grad()
            job.images.encoded = encoded


def _used_share() -> float:
    """The peak of this process's memory on the GPU, of all that it has."""
    return torch.cuda.max_memory_allocated() / torch.cuda.mem_get_info()[1]
