"""Before step one on a GPU: what ``auto`` resolves to, and whether the longest row fits.

A row is tried with everything that a step does except the update; gradients and random numbers are
restored, so that a run is the same with and without these trials.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from vlft import console
from vlft.errors import VlftError
from vlft.planning.memory import ENOUGH_TOKENS, SAFE_SHARE
from vlft.training.longest import bounding_row, longest_row, with_limit
from vlft.training.model import set_checkpointing
from vlft.training.rows import explaining_row, row_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.config import SftConfig
    from vlft.training.job import Job
    from vlft.training.rows import Row

# Steps whose longest row stands for all of them while sizes are tried.
STEPS_TRIED = 32
FEWEST_TOKENS, MOST_TOKENS = 1024, 65_536


def autotune(config: SftConfig, job: Job) -> tuple[SftConfig, Job]:
    """Resolves what is left on ``auto`` by trying rows of this run.

    Returns:
        The settings without any ``auto``, and the job with them; the model is switched to them.

    Raises:
        VlftError: the longest row of the run does not fit into memory.
    """
    tokens, checkpointing = config.tokens_per_microbatch, config.gradient_checkpointing
    if checkpointing is None:
        checkpointing = _needs_checkpointing(job, tokens or ENOUGH_TOKENS)
    if tokens is None:
        tokens = _fitting_tokens(job)
    config = dataclasses.replace(
        config, tokens_per_microbatch=tokens, gradient_checkpointing=checkpointing
    )
    job = dataclasses.replace(job, planner=with_limit(job, tokens))
    try_longest_row(job)
    return config, job


def try_longest_row(job: Job) -> None:
    """Runs the longest row of all epochs once, or one that is at least as long.

    Raises:
        VlftError: it does not fit into memory.
    """
    row = None if job.backend.world.sharded else bounding_row(job)
    if row is not None and _fits(job, row):
        console.info(f"a row of {len(row)} tokens fits, and no row of the run is longer")
        return
    row = longest_row(job, job.options.total_steps)
    _try_row(job, row)
    console.info(f"the longest row of the run, {len(row)} tokens, fits")


def _needs_checkpointing(job: Job, tokens: int) -> bool:
    """Whether rows fit only with gradient checkpointing, which costs a third more arithmetic.

    A sharded model keeps it, see ``_fitting_tokens``.

    Args:
        job: see Job.
        tokens: limit of the row that is to fit.
    """
    if job.backend.world.sharded:
        return True
    model = job.backend.model
    set_checkpointing(model, on=False)
    needed = not all(job.backend.world.all_gather(_all_rows_fit(job, tokens)))
    if needed:
        set_checkpointing(model, on=True)
    rows = f"rows of {tokens} tokens"
    found = f"on, {rows} do not fit without" if needed else f"off, {rows} fit without"
    console.info(f"gradient checkpointing: {found}")
    return needed


def _all_rows_fit(job: Job, tokens: int) -> bool:
    """Whether every row of the run fits, with a limit of a row in tokens."""
    row = bounding_row(job, tokens)
    if row is not None:
        if _fits(job, row):
            return True
        if not _fits(job, longest_row(job, _first_steps(job), tokens)):
            return False
    return _fits(job, longest_row(job, job.options.total_steps, tokens))


def _first_steps(job: Job) -> int:
    return min(STEPS_TRIED, job.planner.schedule.steps_per_epoch)


def _fitting_tokens(job: Job) -> int:
    """The largest limit of a row that the GPU takes, found by trying the run's own rows.

    With a sharded model no rank can try on its own, and a rank that runs out of memory would leave
    the others waiting; the default limit is taken then.
    """
    if job.backend.world.sharded:
        return job.planner.packer.tokens_per_row
    steps = _first_steps(job)
    longest = len(longest_row(job, steps, MOST_TOKENS))

    def fits(tokens: int) -> bool:
        return _fits(job, longest_row(job, steps, tokens))

    own = _largest(fits, FEWEST_TOKENS, min(longest, MOST_TOKENS))
    found = min(job.backend.world.all_gather(own))
    console.info(f"--tokens-per-microbatch auto: {found}")
    return found


def _fits(job: Job, row: Row) -> bool:
    """Whether the GPU takes a row and has memory left for what varies between rows."""
    on_gpu = job.backend.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        _try_row(job, row)
    except VlftError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return False
    return not on_gpu or _peak_share() < SAFE_SHARE


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number that fits, to within a quarter; ``low`` if none does.

    Args:
        fits: whether a number fits; monotonous.
        low: tried first.
        high: upper bound of the result.
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


def _try_row(job: Job, row: Row) -> None:
    """Forward and backward of a row next to what a later row of the run meets; leaves no trace.

    Raises:
        VlftError: it does not fit into memory.
    """
    device = job.backend.device
    encoded = job.images.encoded
    job.backend.objective.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            with explaining_row(job, len(row)):
                job.backend.try_gradients(lambda: row_loss(job, row))
        finally:
            job.images.encoded = encoded


def _peak_share() -> float:
    """Share of the GPU's memory in use at the peak, by this process and by others."""
    free, total = torch.cuda.mem_get_info()
    elsewhere = total - free - torch.cuda.memory_reserved()
    return (elsewhere + torch.cuda.max_memory_reserved()) / total
