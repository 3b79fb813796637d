"""vlft: fine-tune, run and merge DeepSeek's vision-language models.

    model, processor = vlft.load("deepseek-ai/deepseek-vl-1.3b-chat")
    replies = vlft.generate(model, processor, [{"query": "What is this?", "images": ["a.jpg"]}])
    result = vlft.sft(vlft.SftConfig(dataset=("train.jsonl",)))

Names are imported at first use, so that ``import vlft`` is instant.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlft.checkpoints.convert import convert
    from vlft.checkpoints.merge import merge_lora
    from vlft.config import (
        ConvertConfig,
        DrawConfig,
        EvalConfig,
        InferConfig,
        MergeLoraConfig,
        PushConfig,
        SftConfig,
    )
    from vlft.data.encode import EncodedSample
    from vlft.errors import VlftError
    from vlft.evaluation.run import run_eval as evaluate
    from vlft.families.processor import Processor
    from vlft.inference.draw import Drawing, draw
    from vlft.inference.generate import generate, load
    from vlft.inference.replier import Reply
    from vlft.inference.run import run_infer as infer
    from vlft.sharing.push import run_push as push
    from vlft.training.run import run_sft as sft

__version__ = "0.1.0"

__all__ = [
    "ConvertConfig", "DrawConfig", "Drawing", "EncodedSample", "EvalConfig", "InferConfig",
    "MergeLoraConfig", "Processor", "PushConfig", "Reply", "SftConfig", "VlftError", "__version__",
    "convert", "draw", "evaluate", "generate", "infer", "load", "merge_lora", "push", "sft",
]  # fmt: skip

_HOMES = {
    "ConvertConfig": "vlft.config:ConvertConfig",
    "DrawConfig": "vlft.config:DrawConfig",
    "Drawing": "vlft.inference.draw:Drawing",
    "EncodedSample": "vlft.data.encode:EncodedSample",
    "EvalConfig": "vlft.config:EvalConfig",
    "InferConfig": "vlft.config:InferConfig",
    "MergeLoraConfig": "vlft.config:MergeLoraConfig",
    "Processor": "vlft.families.processor:Processor",
    "PushConfig": "vlft.config:PushConfig",
    "Reply": "vlft.inference.replier:Reply",
    "SftConfig": "vlft.config:SftConfig",
    "VlftError": "vlft.errors:VlftError",
    "convert": "vlft.checkpoints.convert:convert",
    "draw": "vlft.inference.draw:draw",
    "evaluate": "vlft.evaluation.run:run_eval",
    "generate": "vlft.inference.generate:generate",
    "infer": "vlft.inference.run:run_infer",
    "load": "vlft.inference.generate:load",
    "merge_lora": "vlft.checkpoints.merge:merge_lora",
    "push": "vlft.sharing.push:run_push",
    "sft": "vlft.training.run:run_sft",
}


def __getattr__(name: str) -> object:
    """The public name, imported at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vlft' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    # peft imports bitsandbytes, which warns at its import that it lacks optional CPU kernels.
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        value: object = getattr(importlib.import_module(module), attribute)
    finally:
        log.setLevel(level)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
