"""Unlimited-OCR: DeepSeek-OCR, trained further on long documents, with a window for its replies.

A token of a reply attends to the whole prompt, the page included, and to the last 128 tokens of
the reply ("reference sliding window attention"), so that generation keeps no more of a long reply.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlft.families import deepseek_ocr, ocr, ocr_config
from vlft.families.ocr_pages import Pages, page_pixels

if TYPE_CHECKING:
    from vlft.families.base import Config

ARCHITECTURE, MODEL_TYPE = "UnlimitedOCRForCausalLM", "unlimited-ocr"


def _matches(config: Config) -> bool:
    return ocr_config.window_of(config) is not None and (
        ARCHITECTURE in (config.get("architectures") or ()) or deepseek_ocr.has_towers(config)
    )


def _native_config(config: Config, image_token_id: int) -> dict[str, Any]:
    """Keyword arguments of UnlimitedOcrConfig, with the window in every layer."""
    native = deepseek_ocr.native_config(config, image_token_id)
    text = native["text_config"]
    text["layer_types"] = [ocr_config.WINDOWED] * text["num_hidden_layers"]
    text["sliding_window"] = ocr_config.window_of(config)
    return native


def _original_config(native: Config, dtype: str, images: Config) -> dict[str, Any]:
    """config.json of the authors' layout for keyword arguments of UnlimitedOcrConfig."""
    config = deepseek_ocr.original_config(native, dtype, images)
    window = {"sliding_window_size": native["text_config"]["sliding_window"]}
    config |= {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **window}
    config["sliding_window"] = window["sliding_window_size"]
    config["language_config"] |= window
    return config


# Up to 32 tiles, where DeepSeek-OCR has 9: the limit of the transformers class that Baidu's weights
# were released with. If a prompt holds several pages, none is cut into tiles, as the authors do it.
PAGES = Pages(
    deepseek_ocr.MODES, "gundam", max_tiles=32, tokens=deepseek_ocr.tokens, grids=True,
    native="UnlimitedOcr", tiles_one=True,
)  # fmt: skip

FAMILY = replace(
    deepseek_ocr.FAMILY,
    name="unlimited_ocr",
    title="Unlimited-OCR",
    model_types={
        MODEL_TYPE: "original",
        "deepseek_vl_v2": "original",
        "unlimited_ocr": "transformers",
    },
    matches=_matches,
    matches_native=lambda config: ocr_config.window_of(config) is not None,
    check_form=ocr.check_question,
    several_images=True,
    max_new_tokens=32768,
    no_repeat_ngram=35,
    ngram_window=128,
    ngram_exempt=(),
    native_config=_native_config,
    pixels=lambda folder, *_: page_pixels(folder, PAGES),
    original_config=_original_config,
)
