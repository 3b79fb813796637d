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

from vlft.errors import VlftError, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vlft.data.encode import ChatFormat
    from vlft.data.split import Position
    from vlft.inference.generate import Sampling


# A reply that goes on like this has become a loop: so many tokens in which a piece of at most
# LOOP_PIECE repeats. A table of empty cells is shorter.
LOOP_TOKENS, LOOP_PIECE = 1024, 64


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Samples by the Gumbel-max trick: the argmax of scores plus Gumbel noise is a sample.

    Each row has a generator of its own, so that its draws do not depend on the other rows.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """(B, V) scores with noise."""
        return scores + self.noise(scores)

    def noise(self, scores: Tensor) -> Tensor:
        """(B, V) float32 Gumbel noise for scores (B, V)."""
        waits = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        # -log(0) is infinite: it would select even a token whose score is minus infinity.
        return -waits.clamp_min_(torch.finfo(torch.float32).tiny).log()


class Finite(LogitsProcessor):  # type: ignore[misc]
    """Ends generation where the model's scores are no numbers: any choice would be arbitrary.

    Args:
        name: of the model, its folder or hub id.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """(B, V) scores as they are.

        Raises:
            VlftError: one is NaN or plus infinity.
        """
        # The largest is NaN if any is.
        if not scores.max().isfinite():
            found = "its scores are no numbers (NaN)"
            hint = (
                "use --dtype float32 or bfloat16, try it without its adapter if it has one, or "
                "compare its weights with the original"
            )
            raise VlftError(found, place=shown(self._name), hint=hint)
        return scores


class RowLimits(StoppingCriteria):  # type: ignore[misc]
    """Stops each row at its own limit of new tokens.

    Args:
        prompt: length of the padded prompts, in tokens.
        limits: (B,), most new tokens of each row.
    """

    def __init__(self, prompt: int, limits: Tensor) -> None:
        self._ends = prompt + limits

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        """(R,), whether each row has ended; with beams a prompt has several rows."""
        ends = self._ends.to(input_ids.device).repeat_interleave(len(input_ids) // len(self._ends))
        return input_ids.shape[1] >= ends


class Loops(StoppingCriteria):  # type: ignore[misc]
    """Stops a reply that repeats itself without end.

    Args:
        prompt: length of the padded prompts, in tokens.
        rows: number of replies.
        enabled: whether any is stopped.

    Attributes:
        ends: the length at which each reply was stopped; None for those that were not.
    """

    def __init__(self, prompt: int, rows: int, *, enabled: bool = True) -> None:
        self._prompt = prompt
        self._enabled = enabled
        self.ends: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        """(R,), whether each row has become a loop; R is larger than the replies with beams."""
        candidates: list[int | None] = [None] * len(input_ids)
        found = self.ends if len(input_ids) == len(self.ends) else candidates
        length = input_ids.shape[1] - self._prompt
        if self._enabled and length >= LOOP_TOKENS and length % LOOP_PIECE == 0:
            for row, tail in enumerate(input_ids[:, -LOOP_TOKENS:].cpu()):
                if found[row] is None and is_loop(tail):
                    found[row] = length
        return torch.tensor([end is not None for end in found], device=input_ids.device)


def is_loop(tokens: Tensor) -> bool:
    """Whether (T,) tokens are a piece of at most LOOP_PIECE tokens, over and over."""
    return any(torch.equal(tokens[p:], tokens[:-p]) for p in range(1, LOOP_PIECE + 1))


class NoRepeatNgram(LogitsProcessor):  # type: ignore[misc]
    """Bans tokens that would complete a sequence of ``size`` tokens which has occurred before.

    Each row is looked at from its own start, so that padding bans nothing. What has occurred is
    kept from step to step; a row that is another one now, as in a beam search, is read again.

    Args:
        size: tokens of a sequence.
        starts: of each row, the first token that counts.
        window: only sequences within so many of the last tokens count; 0 for all.
        exempt: ids that are never banned.
        reorders: whether a row may become another one from step to step.
    """

    def __init__(
        self,
        size: int,
        starts: Sequence[int],
        window: int = 0,
        exempt: Sequence[int] = (),
        *,
        reorders: bool = False,
    ) -> None:
        self._size, self._window, self._exempt = size, window, set(exempt)
        self._reorders = reorders
        self._tokens: list[list[int]] = [[] for _ in starts]
        self._starts = list(starts)
        # By the first size - 1 tokens: (place of the first, the last token) of each sequence.
        self._seen: list[dict[tuple[int, ...], list[tuple[int, int]]]] = [{} for _ in starts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) scores, minus infinity for banned tokens."""
        scores = scores.clone()
        for row, start in enumerate(self._starts):
            if self._reorders:
                self._forget_another(row, input_ids[row, start:])
            self._read(row, input_ids[row, start + len(self._tokens[row]) :].tolist())
            banned = self.banned(row)
            if banned:
                scores[row, torch.tensor(sorted(banned), device=scores.device)] = -torch.inf
        return scores

    def banned(self, row: int) -> set[int]:
        """The tokens that must not come next."""
        tokens = self._tokens[row]
        if len(tokens) < self._size:
            return set()
        first = max(0, len(tokens) - self._window) if self._window else 0
        found = self._seen[row].get(tuple(tokens[len(tokens) - self._size + 1 :]), ())
        return {token for place, token in found if place >= first} - self._exempt

    def _forget_another(self, row: int, ids: Tensor) -> None:
        """Forgets what a row was, if it does not go on with it."""
        known = self._tokens[row]
        if ids[: len(known)].tolist() != known:
            self._tokens[row], self._seen[row] = [], {}

    def _read(self, row: int, new: list[int]) -> None:
        tokens, seen = self._tokens[row], self._seen[row]
        for token in new:
            place = len(tokens) - self._size + 1
            if place >= 0:
                seen.setdefault(tuple(tokens[place:]), []).append((place, token))
            tokens.append(token)


def score_changes(
    sampling: Sampling,
    lengths: Sequence[int],
    seeds: Sequence[int],
    device: torch.device,
    chat: ChatFormat,
    name: str,
) -> LogitsProcessorList:
    """The processors of the scores before the argmax, in transformers' order.

    Args:
        sampling: settings of the replies, all of them resolved.
        lengths: of the prompts, in tokens.
        seeds: one for each row.
        device: of the scores.
        chat: of the model.
        name: of the model, its folder or hub id.
    """
    found = LogitsProcessorList([Finite(name)])
    beams = sampling.num_beams
    lengths = [length for length in lengths for _ in range(beams)]
    longest = max(lengths)
    if sampling.repetition_penalty != 1:
        all_counts = sampling.repetition_context == "all"
        ignored = [longest - length if all_counts else longest for length in lengths]
        penalty = float(sampling.repetition_penalty)
        found.append(RepetitionPenaltyLogitsProcessor(penalty, torch.tensor(ignored)))
    if size := sampling.no_repeat_ngram:
        window = sampling.ngram_window or 0
        starts = [longest if window else longest - length for length in lengths]
        exempt = chat.ngram_exempt if window else ()
        found.append(NoRepeatNgram(size, starts, window, exempt, reorders=beams > 1))
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
