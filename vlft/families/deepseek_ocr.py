"""DeepSeek-OCR: reads documents, in modes from 73 to 1,263 tokens a page.

page, its tiles -> SAM tower -> CLIP tower, which takes SAM's features for patches
                   both side by side -> linear -> rows with newlines -> mixture-of-experts LLM

transformers has the architecture under the name of Unlimited-OCR, which was made from it and has a
window for its replies (unlimited_ocr.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlft.families import ocr, ocr_config
from vlft.families.base import Config, Family, Parts
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.ocr_pages import IMAGE_TAG, TOKEN_PIXELS, ImageMode, Pages, page_pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from vlft.data.encode import Tiles

CLIP: Config = {"width": 1024, "layers": 24, "heads": 16, "image_size": 224, "patch_size": 14}
CLIP_NAMES = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "image_size": "image_size", "patch_size": "patch_size",
}  # fmt: skip
ARCHITECTURE, TOWER = "DeepseekOCRForCausalLM", "deeplip_b_l"
TILE = 640
MODES = {
    "gundam": ImageMode(1024, padded=True, tile=TILE),
    "tiny": ImageMode(512, padded=False),
    "small": ImageMode(640, padded=False),
    "base": ImageMode(1024, padded=True),
    "large": ImageMode(1280, padded=True),
}
VISION, NATIVE = "model.vision_model", "model.vision_tower.vision_encoder"
LAYER, NATIVE_LAYER = f"{VISION}.transformer.layers.{{i}}", f"{NATIVE}.encoder.layers.{{i}}"

KEYS = KeyMap(
    [
        KeyRule(
            f"{LAYER}.self_attn.qkv_proj.{{p}}",
            tuple(f"{NATIVE_LAYER}.self_attn.{part}_proj.{{p}}" for part in "qkv"),
            "split",
        ),
        KeyRule(f"{LAYER}.{{rest}}", (f"{NATIVE_LAYER}.{{rest}}",)),
        KeyRule(f"{VISION}.{{rest}}", (f"{NATIVE}.{{rest}}",)),
        KeyRule("model.image_newline", ("model.image_newline",)),
        *ocr.key_rules(),
    ],
    unused=[f"{VISION}.embeddings.patch_embedding.weight"],
)


def has_towers(config: Config) -> bool:
    """Whether a config.json of the authors' layout names SAM followed by CLIP."""
    return bool((config.get("vision_config") or {}).get("model_name") == TOWER)


def _matches(config: Config) -> bool:
    return ocr_config.window_of(config) is None and (
        ARCHITECTURE in (config.get("architectures") or ()) or has_towers(config)
    )


def native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of UnlimitedOcrConfig, with full attention in every layer."""
    text = ocr_config.text_config(config)
    if ocr_config.is_original(config):
        clip = ocr_config.widths(config, "clip-l-14-224", CLIP)
    else:
        encoder = config["vision_config"]["encoder_config"]
        clip = {name: encoder[native] for name, native in CLIP_NAMES.items()}
    full = [ocr_config.FULL] * text["num_hidden_layers"]
    encoder = {
        **{native: clip[name] for name, native in CLIP_NAMES.items()},
        "intermediate_size": 4 * clip["width"],
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    return {
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
        # The class demands a window; no layer uses it.
        "text_config": {**text, "layer_types": full, "sliding_window": 128},
        "vision_config": {"sam_config": ocr_config.sam_config(config), "encoder_config": encoder},
    }


def original_config(native: Config, dtype: str, images: Config) -> dict[str, Any]:  # noqa: ARG001
    """config.json of the authors' layout for keyword arguments of UnlimitedOcrConfig."""
    vision = native["vision_config"]
    sam, encoder = vision["sam_config"], vision["encoder_config"]
    return ocr_config.original_config(
        native,
        dtype,
        architecture=ARCHITECTURE,
        tower=TOWER,
        width={"clip-l-14-224": {name: encoder[key] for name, key in CLIP_NAMES.items()}},
        features=encoder["hidden_size"] + sam["downsample_channels"][-1],
    )


def tokens(side: int, tile_side: int, tiles: Tiles) -> int:
    """Tokens of an image: all tiles as one grid, then the whole; a newline per row, a separator."""
    across, down = tiles
    return down * tile_side * (across * tile_side + 1) * (across > 0) + side * (side + 1) + 1


def _align(model: nn.Module, features: Tensor, tiles: Sequence[Tiles]) -> Tensor:
    """(R, D) for features of the towers; newlines and separators are included."""
    parts: Any = model.model
    projected = parts.multi_modal_projector(features)
    rows: list[Tensor] = []
    for (local, whole), (across, down) in zip(
        ocr.images_of(projected, tiles, TILE), tiles, strict=True
    ):
        if across:
            side = TILE // TOKEN_PIXELS
            grid = local.view(down, across, side, side, -1).transpose(1, 2)
            rows.append(_with_newlines(grid.flatten(2, 3).flatten(0, 1), parts.image_newline))
        side = round(len(whole) ** 0.5)
        rows.append(_with_newlines(whole.view(side, side, -1), parts.image_newline))
        rows.append(parts.view_separator.unsqueeze(0))
    return torch.cat(rows)


def _with_newlines(grid: Tensor, newline: Tensor) -> Tensor:
    """(h, w, D) tokens -> (h * (w + 1), D), a newline after each row."""
    return torch.cat([grid, newline.expand(len(grid), 1, -1)], dim=1).flatten(0, 1)


PAGES = Pages(MODES, "gundam", max_tiles=9, tokens=tokens, grids=True, native="UnlimitedOcr")

FAMILY = Family(
    name="deepseek_ocr",
    title="DeepSeek-OCR",
    model_types={"deepseek_vl_v2": "original", "unlimited_ocr": "transformers"},
    matches=_matches,
    matches_native=lambda config: ocr_config.window_of(config) is None,
    class_name="transformers:UnlimitedOcrForConditionalGeneration",
    chat_text=ocr.chat_text,
    check_form=ocr.check_form,
    template=None,
    image_tag=IMAGE_TAG,
    has_boxes=True,
    # As the authors' ``infer``.
    max_new_tokens=8192,
    no_repeat_ngram=20,
    ngram_exempt=("<td>", "</td>"),
    stops_loops=True,
    system_prompt="",
    parts=Parts(
        vision=("model.vision_tower",),
        aligner=("model.multi_modal_projector", "model.image_newline", "model.view_separator"),
    ),
    keys=KEYS,
    native_config=native_config,
    pixels=lambda folder, *_: page_pixels(folder, PAGES),
    vision_features=ocr.vision_features,
    align=_align,
    original_config=original_config,
)
