"""DeepSeek-OCR-2: reads documents, in modes from 145 to 1,121 tokens a page.

page, its tiles -> SAM tower -> Qwen2 as an encoder: its patches, then learned queries
                   what the queries give -> linear -> mixture-of-experts LLM
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vlft.families import deepseek_ocr, ocr, ocr_config
from vlft.families.base import Config, Parts
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.ocr_pages import ImageMode, Pages, page_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from vlft.data.encode import Tiles

QWEN2: Config = {"dim": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate_size": 4864}
QWEN2_NAMES = {
    "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "intermediate_size": "intermediate_size",
}  # fmt: skip
ARCHITECTURE, TOWER = "DeepseekOCR2ForCausalLM", "deepencoderv2"
TILE = 768
# There are queries for views of 768 and 1024 pixels alone.
MODES = {
    "gundam": ImageMode(1024, padded=True, tile=TILE),
    "small": ImageMode(768, padded=False),
    "base": ImageMode(1024, padded=True),
}
ENCODER, NATIVE = "model.qwen2_model", "model.vision_tower"

KEYS = KeyMap(
    [
        KeyRule(f"{ENCODER}.model.model.{{rest}}", (f"{NATIVE}.vision_encoder.{{rest}}",)),
        *(
            KeyRule(f"{ENCODER}.query_{n}.{{p}}", (f"{NATIVE}.query_{n}_resolution.{{p}}",))
            for n in (768, 1024)
        ),
        *ocr.key_rules(),
    ]
)


def _matches(config: Config) -> bool:
    tower = (config.get("vision_config") or {}).get("model_name")
    return ARCHITECTURE in (config.get("architectures") or ()) or tower == TOWER


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of DeepseekOcr2Config."""
    if ocr_config.is_original(config):
        qwen = ocr_config.widths(config, "qwen2-0-5b", QWEN2)
    else:
        encoder = config["vision_config"]["encoder_config"]
        qwen = {name: encoder[native] for name, native in QWEN2_NAMES.items()}
    encoder = {
        **{native: qwen[name] for name, native in QWEN2_NAMES.items()},
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
    }
    # The last of the stated channels is wrong in the published file: it is the encoder's width.
    sam = ocr_config.sam_config(config, last_channels=qwen["dim"])
    return {
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
        "text_config": ocr_config.text_config(config),
        "vision_config": {"sam_config": sam, "encoder_config": encoder},
    }


def _original_config(native: Config, dtype: str, images: Config) -> dict[str, Any]:  # noqa: ARG001
    """config.json of the authors' layout for keyword arguments of DeepseekOcr2Config."""
    encoder = native["vision_config"]["encoder_config"]
    return ocr_config.original_config(
        native,
        dtype,
        architecture=ARCHITECTURE,
        tower=TOWER,
        width={"qwen2-0-5b": {name: encoder[key] for name, key in QWEN2_NAMES.items()}},
        features=encoder["hidden_size"],
    )


def tokens(side: int, tile_side: int, tiles: Tiles) -> int:
    """Tokens of an image: one tile after the other, the whole, a separator."""
    return tiles[0] * tiles[1] * tile_side**2 + side**2 + 1


def _align(model: nn.Module, features: Tensor, tiles: Sequence[Tiles]) -> Tensor:
    """(R, D) for features of the towers; separators are included."""
    parts: Any = model.model
    projected = parts.multi_modal_projector(features)
    separator = parts.view_separator.unsqueeze(0)
    images = ocr.images_of(projected, tiles, TILE)
    return torch.cat([part for local, whole in images for part in (local, whole, separator)])


PAGES = Pages(MODES, "gundam", max_tiles=6, tokens=tokens, grids=False, native="DeepseekOcr2")

FAMILY = replace(
    deepseek_ocr.FAMILY,
    name="deepseek_ocr2",
    title="DeepSeek-OCR-2",
    model_types={"deepseek_vl_v2": "original", "deepseek_ocr2": "transformers"},
    matches=_matches,
    matches_native=lambda _: True,
    class_name="transformers:DeepseekOcr2ForConditionalGeneration",
    parts=Parts(
        vision=("model.vision_tower",),
        aligner=("model.multi_modal_projector", "model.view_separator"),
    ),
    keys=KEYS,
    native_config=_native_config,
    pixels=lambda folder, *_: page_pixels(folder, PAGES),
    align=_align,
    original_config=_original_config,
)
