"""Rows -> replies: loading a model to run, and generating with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from vlft.families.image_settings import ImageSettings
from vlft.inference.replier import Replier, Reply
from vlft.settings import build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.encode import EncodedSample
    from vlft.families.base import Family
    from vlft.families.processor import Processor

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
    stop: tuple[str, ...] = ()
    num_beams: int = InferConfig.num_beams

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
    stop: tuple[str, ...] = (),
    num_beams: int = InferConfig.num_beams,
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
        stop,
        num_beams,
    )
    return generate_replies(model, processor, prompts, sampling)


def generate_replies(
    model: Any,
    processor: Processor,
    prompts: Sequence[EncodedSample],
    sampling: Sampling,
    streamer: Any = None,
    seeds: Sequence[int] | None = None,
) -> list[Reply]:
    """Replies to encoded prompts, in one batch; see ``Replier.replies``.

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
    if not prompts:
        return []
    seeds = seeds or torch.randint(2**62, (len(prompts),)).tolist()
    replier = Replier(model, processor, sampling)
    return next(replier.replies(prompts, seeds, [range(len(prompts))], streamer))
