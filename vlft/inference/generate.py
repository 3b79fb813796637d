"""Rows -> replies: loading a model to run, and generating with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import locate_model
from vlft.checkpoints.placement import resolve_placement
from vlft.checkpoints.tuned import other_base
from vlft.config import InferConfig, SftConfig
from vlft.console import warn
from vlft.data.names import DRAWN
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.errors import DataError, explaining_memory
from vlft.families.image_settings import ImageSettings
from vlft.inference.decoding import Loops, RowLimits, score_changes
from vlft.settings import build
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.encode import EncodedSample
    from vlft.families.base import Family
    from vlft.families.processor import Processor

SMALLER = "lower --batch-size or --max-new-tokens, use fewer images, or use --quantize nf4"


# The fields of a row that are its reply.
REPLIES = ("response", DRAWN)


@dataclass(frozen=True)
class Sampling:
    """How replies are generated; see the flags of the same names.

    Raises:
        UsageError: a setting, or a combination of them, that is not allowed.
    """

    max_new_tokens: int | None = InferConfig.max_new_tokens
    temperature: float = InferConfig.temperature
    top_p: float = InferConfig.top_p
    top_k: int = InferConfig.top_k
    repetition_penalty: float = InferConfig.repetition_penalty
    repetition_context: str = InferConfig.repetition_context
    no_repeat_ngram: int | None = InferConfig.no_repeat_ngram
    ngram_window: int | None = InferConfig.ngram_window

    def resolved(self, family: Family) -> Sampling:
        """The settings with the family's own in the place of None."""
        return replace(
            self,
            max_new_tokens=self.max_new_tokens or family.max_new_tokens,
            no_repeat_ngram=family.no_repeat_ngram
            if self.no_repeat_ngram is None
            else self.no_repeat_ngram,
            ngram_window=self.ngram_window or family.ngram_window,
        )

    def __post_init__(self) -> None:
        build(InferConfig, asdict(self))


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


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: str = InferConfig.dtype,
    quantize: str = SftConfig.quantize,
    device: str = InferConfig.device,
    image_mode: str | None = InferConfig.image_mode,
    max_tiles: int | None = InferConfig.max_tiles,
    special_tokens: str = SftConfig.special_tokens,
) -> tuple[Any, Processor]:
    """A model in evaluation mode, and its processor.

    Args:
        path: model folder or hub id.
        adapter: folder of an adapter to load into it.
        dtype: auto, float32, bfloat16 or float16.
        quantize: none, nf4 or int8.
        device: auto, cpu or cuda.
        image_mode: how a page becomes views, for the families that have modes.
        max_tiles: most tiles of an image, for the families that have tiles.
        special_tokens: whether those in texts are plain ``text``, or tokens (``keep``).

    Returns:
        transformers' class of the family, or peft's model around it if there is an adapter.

    Raises:
        CheckpointError: a folder cannot be used.
    """
    folder = locate_model(str(path))
    processor = ImageSettings(image_mode=image_mode, max_tiles=max_tiles).apply(folder.processor())
    processor = processor.with_special_tokens(special_tokens)
    placement = resolve_placement(dtype=dtype, device=device, quantize=quantize)
    model: Any = load_model(folder, placement)
    if adapter is None:
        return model, processor
    if problem := other_base(Path(adapter), folder):
        warn(f"{problem.place}: {problem.message}")
    return load_adapter(model, Path(adapter)), processor


def generate(
    model: Any,
    processor: Processor,
    rows: Sequence[Mapping[str, Any]],
    max_new_tokens: int | None = InferConfig.max_new_tokens,
    *,
    image_root: str | Path | None = None,
    temperature: float = InferConfig.temperature,
    top_p: float = InferConfig.top_p,
    top_k: int = InferConfig.top_k,
    repetition_penalty: float = InferConfig.repetition_penalty,
    repetition_context: str = InferConfig.repetition_context,
    no_repeat_ngram: int | None = InferConfig.no_repeat_ngram,
    ngram_window: int | None = InferConfig.ngram_window,
) -> list[Reply]:
    """Replies to rows of the native layout, in one batch; a reply in them is ignored.

    Samples are drawn with seeds from torch's global generator.

    Raises:
        DataError: a row cannot be used.
        UsageError: see ``Sampling``.
    """
    prompts = [
        processor.encode({k: v for k, v in row.items() if k not in REPLIES}, image_root)
        for row in rows
    ]
    warn_of_special_tokens([("", prompt.as_text) for prompt in prompts])
    sampling = Sampling(
        max_new_tokens,
        temperature,
        top_p,
        top_k,
        repetition_penalty,
        repetition_context,
        no_repeat_ngram,
        ngram_window,
    )
    return generate_replies(model, processor, prompts, sampling)


@explaining_memory("while replies are generated", SMALLER)
def generate_replies(
    model: Any,
    processor: Processor,
    prompts: Sequence[EncodedSample],
    sampling: Sampling,
    streamer: Any = None,
    seeds: Sequence[int] | None = None,
) -> list[Reply]:
    """Replies to encoded prompts; none depends on the others.

    They are one batch, but where replies have a window only prompts of one length are: the cache of
    transformers 5.24 looks for padding in the wrong places once it drops tokens of a reply.

    Args:
        model: of ``load``.
        processor: of ``load``.
        prompts: encoded without replies.
        sampling: how replies are generated.
        streamer: of transformers, for a single prompt.
        seeds: of each prompt's draws; None takes them from torch's global generator.

    Raises:
        DataError: a prompt leaves no room for a reply.
    """
    seeds = seeds or torch.randint(2**62, (len(prompts),)).tolist()
    batches: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        batches.setdefault(len(prompt) if processor.chat.window else 0, []).append(number)
    replies: dict[int, Reply] = {}
    for numbers in batches.values():
        together, drawn = [prompts[i] for i in numbers], [seeds[i] for i in numbers]
        made = _generate_batch(model, processor, together, sampling, streamer, drawn)
        replies.update(zip(numbers, made, strict=True))
    return [replies[number] for number in range(len(prompts))]


def _generate_batch(
    model: Any,
    processor: Processor,
    prompts: Sequence[EncodedSample],
    sampling: Sampling,
    streamer: Any,
    seeds: Sequence[int],
) -> list[Reply]:
    """Replies to at least one prompt, in one batch; see ``generate_replies``."""
    sampling = sampling.resolved(processor.family)
    lengths = list(map(len, prompts))
    longest = max(lengths)
    _check_room(longest, processor)
    inputs = {name: t for name, t in processor.collate(prompts).items() if name != "labels"}
    embeddings = model.get_input_embeddings().weight
    asked = sampling.max_new_tokens or 0
    limits = [min(asked, processor.max_length - length) for length in lengths]
    loops = Loops(longest, len(prompts), enabled=processor.family.stops_loops)
    with torch.inference_mode():
        output = model.generate(
            **moved(inputs, embeddings),
            generation_config=_generation_config(processor, max(limits)),
            # These processors also sample, so transformers only has to take the argmax.
            logits_processor=score_changes(
                sampling, lengths, seeds, embeddings.device, processor.chat, model.name_or_path
            ),
            stopping_criteria=[RowLimits(longest, torch.tensor(limits)), loops],
            streamer=streamer,
        )
    rows = zip(output[:, longest:].tolist(), limits, loops.ends, strict=True)
    return [_reply(ids[: end or limit], limit < asked, end, processor) for ids, limit, end in rows]


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
