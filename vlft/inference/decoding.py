"""Chooses the next token and ends replies, for each record independently of its batch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vlft.data.split import Position
    from vlft.inference.generate import Sampling


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Samples by the Gumbel-max trick: the argmax of scores plus Gumbel noise is a sample.

    Each row has a generator of its own, so that its draws do not depend on the other rows.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """(B, V) scores with noise."""
        waits = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        # -log(0) is infinite: it would select even a token whose score is minus infinity.
        return scores - waits.clamp_min_(torch.finfo(torch.float32).tiny).log()


class RowLimits(StoppingCriteria):  # type: ignore[misc]
    """Stops each row at its own limit of new tokens.

    Args:
        prompt: length of the padded prompts, in tokens.
        limits: (B,), most new tokens of each row.
    """

    def __init__(self, prompt: int, limits: Tensor) -> None:
        self._ends = prompt + limits

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        """(B,), whether each row has ended."""
        self._ends = self._ends.to(input_ids.device)
        return input_ids.shape[1] >= self._ends


def score_changes(
    sampling: Sampling, lengths: Sequence[int], seeds: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """The processors of the scores before the argmax, in transformers' order.

    Args:
        sampling: settings of the replies.
        lengths: of the prompts, in tokens.
        seeds: one for each row.
        device: of the scores.
    """
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        longest = max(lengths)
        all_counts = sampling.repetition_context == "all"
        ignored = [longest - length if all_counts else longest for length in lengths]
        penalty = float(sampling.repetition_penalty)
        found.append(RepetitionPenaltyLogitsProcessor(penalty, torch.tensor(ignored)))
    if sampling.temperature > 0:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(float(sampling.top_p)))
        found.append(Draw(seeds, device))
    return found


def record_seed(seed: int, position: Position) -> int:
    """The seed of a record's draws, made from the command's seed and the record's position."""
    number, record = position
    text = f"{seed}/{number}/{record}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
