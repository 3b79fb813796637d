"""Encoded prompts -> replies, in batches that share the work on their prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from vlft.errors import DataError, explaining_memory
from vlft.inference.decoding import Loops, RowLimits, score_changes
from vlft.inference.features import Features
from vlft.inference.following import Following
from vlft.inference.prefill import SharedPrompts, can_share
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor
    from vlft.inference.following import Reader
    from vlft.inference.generate import Sampling

SMALLER = "lower --batch-size or --max-new-tokens, use fewer images, or use --quantize nf4"


@dataclass(frozen=True)
class Reply:
    """What the model generated.

    Attributes:
        text: without special tokens and surrounding white space.
        token_ids: up to and including the end-of-sentence token, if there is one.
        finish: how it ended: stop, with that token; length, at the most new tokens that were asked
            for; window, where the model's context was full; loop, where it repeated itself without
            end.
    """

    text: str
    token_ids: list[int]
    finish: Literal["stop", "length", "window", "loop"]


class _Prompts(Protocol):
    def inputs(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What ``generate`` takes for some of the prompts."""


@dataclass(frozen=True)
class _PlainPrompts:
    """Prompts that run with their replies, in padded batches."""

    prompts: Sequence[EncodedSample]
    processor: Processor

    def inputs(self, numbers: Sequence[int]) -> dict[str, Any]:
        batch = self.processor.collate([self.prompts[number] for number in numbers])
        return {name: value for name, value in batch.items() if name != "labels"}


class Replier:
    """A model that replies.

    Args:
        model: of ``load``.
        processor: of ``load``.
        sampling: how replies are generated.
        features: of images; None for new ones of the towers.
        chunk: tokens of prompts that run at once, see ``SharedPrompts``.
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        sampling: Sampling,
        features: Features | None = None,
        chunk: int | None = None,
    ) -> None:
        self._model, self._processor, self._chunk = model, processor, chunk
        self._sampling = sampling.resolved(processor.family)
        self._whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._features = features or Features(self._whole, processor)

    @explaining_memory("while replies are generated", SMALLER)
    def replies(
        self,
        prompts: Sequence[EncodedSample],
        seeds: Sequence[int],
        batches: Sequence[Sequence[int]],
        streamer: Any = None,
        readers: Sequence[Reader] | None = None,
    ) -> Iterator[list[Reply]]:
        """The replies of each batch; none depends on the other prompts.

        Args:
            prompts: encoded without replies. What is common to some of them is computed once.
            seeds: of each prompt's draws.
            batches: numbers of the prompts that are answered together.
            streamer: of transformers, for a single prompt.
            readers: of each prompt's reply, while it is generated.

        Raises:
            DataError: a prompt leaves no room for a reply.
        """
        _check_room(max(map(len, prompts)), self._processor)
        ready: _Prompts = _PlainPrompts(prompts, self._processor)
        with explaining_memory("while replies are generated", SMALLER):
            if can_share(prompts, self._processor):
                ready = SharedPrompts(
                    self._whole, self._processor, prompts, self._features, self._chunk
                )
            for batch in batches:
                made: dict[int, Reply] = {}
                for numbers in self._alike(prompts, batch):
                    heard = None if readers is None else [readers[number] for number in numbers]
                    inputs = ready.inputs(numbers)
                    found = self._generate(prompts, seeds, numbers, inputs, streamer, heard)
                    made.update(zip(numbers, found, strict=True))
                yield [made[number] for number in batch]

    def _alike(
        self, prompts: Sequence[EncodedSample], batch: Sequence[int]
    ) -> Sequence[Sequence[int]]:
        """The numbers of a batch, divided by length where replies have a window.

        The cache of transformers 5.24 looks for padding in the wrong places once it drops tokens.
        """
        if self._processor.chat.window is None:
            return [batch]
        alike: dict[int, list[int]] = {}
        for number in batch:
            alike.setdefault(len(prompts[number]), []).append(number)
        return list(alike.values())

    def _generate(
        self,
        prompts: Sequence[EncodedSample],
        seeds: Sequence[int],
        numbers: Sequence[int],
        inputs: dict[str, Any],
        streamer: Any,
        readers: Sequence[Reader] | None,
    ) -> list[Reply]:
        """The replies of one batch."""
        model, processor, sampling = self._model, self._processor, self._sampling
        lengths = [len(prompts[number]) for number in numbers]
        longest = max(lengths)
        asked = [reader.most for reader in readers or ()]
        asked = asked or [sampling.max_new_tokens or 0] * len(numbers)
        limits = [
            min(most, processor.max_length - length)
            for most, length in zip(asked, lengths, strict=True)
        ]
        loops = Loops(longest, len(numbers), enabled=processor.family.stops_loops)
        stops = [RowLimits(longest, torch.tensor(limits)), loops]
        if readers is not None:
            stops.append(Following(longest, readers, limits, processor.chat.eos_id))
        embeddings, drawn = model.get_input_embeddings().weight, [seeds[n] for n in numbers]
        with torch.inference_mode():
            output = model.generate(
                **moved(inputs, embeddings),
                generation_config=_generation_config(processor, max(limits)),
                # These processors also sample, so transformers only has to take the argmax.
                logits_processor=score_changes(
                    sampling, lengths, drawn, embeddings.device, processor.chat, model.name_or_path
                ),
                stopping_criteria=stops,
                streamer=streamer,
            )
        rows = zip(output[:, longest:].tolist(), limits, asked, loops.ends, strict=True)
        return [
            _reply(ids[: end or limit], limit < most, end, processor)
            for ids, limit, most, end in rows
        ]


def _check_room(longest: int, processor: Processor) -> None:
    """Raises DataError if a prompt leaves no room for a reply."""
    if longest >= processor.max_length:
        raise DataError(
            f"a prompt of {longest} tokens, less than {processor.max_length} are allowed",
            hint="shorten the history (in a chat: /clear), or use fewer images",
        )


def _generation_config(processor: Processor, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    chat = processor.chat
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=chat.bos_id,
        eos_token_id=chat.eos_id,
        pad_token_id=chat.pad_id,
    )


def _reply(
    ids: list[int], has_full_window: bool, loop_end: int | None, processor: Processor
) -> Reply:
    """The reply of generated ids, which end where it was stopped."""
    eos_id = processor.chat.eos_id
    finish: Literal["stop", "length", "window", "loop"] = "length"
    if eos_id in ids:
        ids, finish = ids[: ids.index(eos_id) + 1], "stop"
    elif loop_end is not None:
        finish = "loop"
    elif has_full_window:
        finish = "window"
    return Reply(processor.decode(ids), ids, finish)
