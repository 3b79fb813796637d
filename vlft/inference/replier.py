"""Encoded prompts -> replies, in batches that share the work on their prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from vlft.errors import DataError, explaining_memory
from vlft.inference.decoding import Loops, RowLimits, score_changes
from vlft.inference.features import Features
from vlft.inference.following import Following
from vlft.inference.label_loss import LabelLoss, label_loss
from vlft.inference.prefill import SharedPrompts, can_share
from vlft.inference.stops import Stops, text_before
from vlft.models.cache_name import CACHE
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vlft.data.conversation import Conversation
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
        token_ids: up to and including the end-of-sentence token, or those that end the reply.
        loss: of the right reply of the record, if it was asked for.
        finish: how it ended: stop, with that token or before a text of ``Sampling.stop``; length,
            at the most new tokens that were asked for; window, where the model's context was full;
            loop, where it repeated itself without end.
    """

    text: str
    token_ids: list[int]
    finish: Literal["stop", "length", "window", "loop"]
    loss: LabelLoss | None = None


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

    @explaining_memory("while the loss of labels is computed", SMALLER)
    def with_loss(self, reply: Reply, record: Conversation) -> Reply:
        """The reply to a record, with the loss of the right one."""
        return replace(reply, loss=label_loss(self._whole, self._processor, record))

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
            DataError: a prompt leaves no room for a reply, or cannot be answered by beam search.
        """
        _check_room(max(map(len, prompts)), self._processor)
        ready: _Prompts = _PlainPrompts(prompts, self._processor)
        with explaining_memory("while replies are generated", SMALLER):
            if can_share(prompts, self._processor):
                ready = SharedPrompts(
                    self._whole, self._processor, prompts, self._features, self._chunk
                )
            elif self._sampling.num_beams > 1:
                raise _no_beams(self._processor)
            for batch in batches:
                made: dict[int, Reply] = {}
                for numbers in self._alike(prompts, batch):
                    heard = None if readers is None else [readers[number] for number in numbers]
                    inputs = ready.inputs(numbers)
                    if self._sampling.num_beams > 1:
                        inputs[CACHE].batch_repeat_interleave(self._sampling.num_beams)
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
        stops = Stops(longest, len(numbers), sampling.stop, processor.reply_text)
        criteria = [RowLimits(longest, torch.tensor(limits)), loops, stops]
        if readers is not None:
            criteria.append(Following(longest, readers, limits, processor.chat.eos_id))
        embeddings, drawn = model.get_input_embeddings().weight, [seeds[n] for n in numbers]
        with torch.inference_mode():
            output = model.generate(
                **moved(inputs, embeddings),
                generation_config=_generation_config(processor, max(limits), sampling.num_beams),
                # These processors also sample, so transformers only has to take the argmax.
                logits_processor=score_changes(
                    sampling, lengths, drawn, embeddings.device, processor.chat, model.name_or_path
                ),
                stopping_criteria=criteria,
                streamer=streamer,
            )
        rows = zip(output[:, longest:].tolist(), limits, asked, loops.ends, stops.ends, strict=True)
        return [
            _reply(ids[: loop or stop or limit], limit, most, loop, processor, sampling)
            for ids, limit, most, loop, stop in rows
        ]


def _check_room(longest: int, processor: Processor) -> None:
    """Raises DataError if a prompt leaves no room for a reply."""
    if longest >= processor.max_length:
        raise DataError(
            f"a prompt of {longest} tokens, less than {processor.max_length} are allowed",
            hint="shorten the history (in a chat: /clear), or use fewer images",
        )


def _no_beams(processor: Processor) -> DataError:
    """The error for prompts whose keys and values cannot be repeated for each beam."""
    if processor.chat.window is not None:
        found = "replies with a window are not searched by beams"
    else:
        found = "a prompt ends with an image, or is a single token"
    return DataError(found, place="--num-beams", hint="leave --num-beams out")


def _without_padding(ids: list[int], pad_id: int, limit: int) -> tuple[list[int], int | None]:
    """The tokens of a beam, and their number if it was stopped before its limit."""
    length = len(ids)
    while length and ids[length - 1] == pad_id:
        length -= 1
    return ids[:length], length if length < limit else None


def _generation_config(processor: Processor, max_new_tokens: int, num_beams: int) -> Any:
    from transformers import GenerationConfig

    chat = processor.chat
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        bos_token_id=chat.bos_id,
        eos_token_id=chat.eos_id,
        pad_token_id=chat.pad_id,
    )


def _reply(
    ids: list[int],
    limit: int,
    asked: int,
    loop_end: int | None,
    processor: Processor,
    sampling: Sampling,
) -> Reply:
    """The reply of generated ids, which end where it was stopped, at most at its limit."""
    chat = processor.chat
    if sampling.num_beams > 1:
        # Criteria see hypotheses, not replies: what has ended is known by the padding.
        ids, loop_end = _without_padding(ids, chat.pad_id, limit)
    ended = chat.eos_id in ids
    if ended:
        ids = ids[: ids.index(chat.eos_id) + 1]
    text = processor.reply_text(ids)
    before = text_before(text, sampling.stop)
    finish: Literal["stop", "length", "window", "loop"] = "length"
    if ended or before is not None:
        finish = "stop"
    elif loop_end is not None:
        finish = "loop"
    elif limit < asked:
        finish = "window"
    return Reply((text if before is None else before).strip(), ids, finish)
