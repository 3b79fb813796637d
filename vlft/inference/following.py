"""Replies are read while they are generated; a reader may end its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.generation.stopping_criteria import StoppingCriteria

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Reader(Protocol):
    """Reads one reply.

    Attributes:
        most: new tokens of the reply.
    """

    most: int

    def take(self, token_ids: list[int]) -> bool:
        """Takes the next tokens, the last of which may be the end-of-sentence token.

        Returns:
            Whether the reply is to end here.
        """


class Following(StoppingCriteria):  # type: ignore[misc]
    """Gives new tokens to the reader of their row, and stops the rows whose reader wants no more.

    Args:
        prompt: length of the padded prompts, in tokens.
        readers: one for each row.
        limits: most new tokens of each row.
        eos_id: the token that ends a reply; padding follows it.
    """

    def __init__(
        self, prompt: int, readers: Sequence[Reader], limits: Sequence[int], eos_id: int
    ) -> None:
        self._prompt, self._seen = prompt, prompt
        self._readers, self._limits, self._eos_id = readers, limits, eos_id
        self._has_ended = [False] * len(readers)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        """(B,), whether each row has ended."""
        rows = input_ids[:, self._seen :].tolist()
        self._seen = input_ids.shape[1]
        for row, (new, reader) in enumerate(zip(rows, self._readers, strict=True)):
            if not self._has_ended[row]:
                is_last = self._eos_id in new or self._seen - self._prompt >= self._limits[row]
                self._has_ended[row] = reader.take(new) or is_last
        return torch.tensor(self._has_ended, device=input_ids.device)
