"""Rows -> replies: loading a model to run, and generating with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.load import load_model, resolve_placement
from vlft.checkpoints.locate import locate_model
from vlft.config import InferConfig, SftConfig
from vlft.errors import ConfigError, DataError
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor


@dataclass(frozen=True)
class Sampling:
    """How replies are generated; see the flags of the same names.

    Raises:
        ConfigError: a setting of sampling together with temperature 0, which is greedy decoding.
    """

    max_new_tokens: int = InferConfig.max_new_tokens
    temperature: float = InferConfig.temperature
    top_p: float = InferConfig.top_p
    top_k: int = InferConfig.top_k
    repetition_penalty: float = InferConfig.repetition_penalty

    def __post_init__(self) -> None:
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            raise ConfigError(
                "top-p and top-k choose among samples, found temperature 0 (greedy)",
                place="--temperature",
                hint="add e.g. --temperature 0.7",
            )


@dataclass(frozen=True)
class Reply:
    """What the model generated.

    Attributes:
        text: without special tokens and surrounding white space.
        token_ids: up to and including the end-of-sentence token, if there is one.
    """

    text: str
    token_ids: list[int]


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: str = InferConfig.dtype,
    quantize: str = SftConfig.quantize,
    device: str = InferConfig.device,
) -> tuple[Any, Processor]:
    """A model in evaluation mode, and its processor.

    Args:
        path: model folder or hub id.
        adapter: folder of an adapter to load into it.
        dtype: auto, float32, bfloat16 or float16.
        quantize: none, nf4 or int8.
        device: auto, cpu or cuda.

    Returns:
        transformers' class of the family, or peft's model around it if there is an adapter.

    Raises:
        CheckpointError: a folder cannot be used.
    """
    folder = locate_model(str(path))
    processor = folder.processor()
    placement = resolve_placement(folder, dtype=dtype, device=device, quantize=quantize)
    model: Any = load_model(folder, placement)
    return (model if adapter is None else load_adapter(model, Path(adapter))), processor


def generate(
    model: Any,
    processor: Processor,
    rows: Sequence[Mapping[str, Any]],
    max_new_tokens: int = InferConfig.max_new_tokens,
    *,
    image_root: str | Path | None = None,
    temperature: float = InferConfig.temperature,
    top_p: float = InferConfig.top_p,
    top_k: int = InferConfig.top_k,
    repetition_penalty: float = InferConfig.repetition_penalty,
) -> list[Reply]:
    """Replies to rows of the native layout, in one batch; a ``response`` in them is ignored.

    Raises:
        DataError: a row cannot be used.
        ConfigError: see ``Sampling``.
    """
    prompts = [
        processor.encode({k: v for k, v in row.items() if k != "response"}, image_root)
        for row in rows
    ]
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
    return generate_replies(model, processor, prompts, sampling)


def generate_replies(
    model: Any,
    processor: Processor,
    prompts: Sequence[EncodedSample],
    sampling: Sampling,
    streamer: Any = None,
) -> list[Reply]:
    """Replies to encoded prompts, in one batch.

    Raises:
        DataError: a prompt leaves no room for a reply.
    """
    if not prompts:
        return []
    longest = max(map(len, prompts))
    room = processor.max_length - longest
    if room < 1:
        raise DataError(
            f"a prompt of {longest} tokens, less than {processor.max_length} are allowed",
            hint="shorten the history (in a chat: /clear), or use fewer images",
        )
    inputs = processor.collate(prompts)
    del inputs["labels"]
    batch = moved(inputs, model.get_input_embeddings().weight)
    with torch.inference_mode():
        config = _generation_config(processor, sampling, room)
        output = model.generate(**batch, generation_config=config, streamer=streamer)
    return [_reply(ids, processor) for ids in output[:, longest:].tolist()]


def _generation_config(processor: Processor, sampling: Sampling, room: int) -> Any:
    from transformers import GenerationConfig

    chat = processor.chat
    do_sample = sampling.temperature > 0
    # transformers warns about settings of sampling in greedy decoding.
    names = ("temperature", "top_p", "top_k") if do_sample else ()
    return GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room),
        do_sample=do_sample,
        repetition_penalty=sampling.repetition_penalty,
        bos_token_id=chat.bos_id,
        eos_token_id=chat.eos_id,
        pad_token_id=chat.pad_id,
        **{name: getattr(sampling, name) for name in names},
    )


def _reply(ids: list[int], processor: Processor) -> Reply:
    eos_id = processor.chat.eos_id
    end = ids.index(eos_id) + 1 if eos_id in ids else len(ids)
    return Reply(processor.decode(ids[:end]), ids[:end])
