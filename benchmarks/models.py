"""Models with random weights and LoRA: one for each kind of architecture, middle-sized and tiny."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.fake import find_published
from vlft.families.base import encode_images
from vlft.families.deepseek_ocr import FAMILY as DEEPSEEK_OCR
from vlft.families.registry import FAMILIES, find_family
from vlft.models.adaptations import prepare_for_inference
from vlft.training.lora import LoraOptions, add_lora
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from vlft.data.encode import Tiles
    from vlft.families.base import Family, Pixels

SEED = 0


# Name -> family, and (across, down) tiles that an image is cut into beside its whole view.
MODELS: dict[str, tuple[str, Tiles]] = {
    "deepseek-vl": ("deepseek_vl", (0, 0)),
    "deepseek-vl2": ("deepseek_vl2", (2, 1)),
    "deepseek-vl-hybrid": ("deepseek_vl_hybrid", (0, 0)),
    "deepseek-ocr": ("deepseek_ocr", (0, 0)),
}
# Of the families that have modes: a page of 512 pixels, 73 tokens.
MODE = "tiny"
SCALES = ("middle", "tiny")


@dataclass(frozen=True)
class RandomModel:
    """A model in memory.

    Attributes:
        native: keyword arguments of its config.
        model: transformers' class, with LoRA in place.
        tuned: peft's model around it.
        tiles: of each image, see MODELS.
    """

    native: dict[str, Any]
    family: Family
    model: Any
    tuned: Any
    pixels: Pixels
    tiles: Tiles
    image_tokens: int

    @property
    def weight(self) -> torch.Tensor:
        """(V, D) token embeddings, which tell device and dtype of the frozen weights."""
        embeddings: torch.Tensor = self.model.get_input_embeddings().weight
        return embeddings


def random_model(
    name: str, native: dict[str, Any], dtype: torch.dtype, device: torch.device, *, plain: bool
) -> RandomModel:
    """A frozen model with float32 LoRA on the LLM's q, k, v, see ``with_lora``.

    A plain model computes as transformers has it; otherwise it is adapted as when vlft loads it.
    """
    torch.manual_seed(SEED)
    family_name, tiles = MODELS[name]
    family = next(family for family in FAMILIES if family.name == family_name)
    cls = family.model_class()
    config = cls.config_class(**native)
    with device:
        model = cls._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False).to(device)
    if not plain:
        prepare_for_inference(model)
    elif "n_routed_experts" in native["text_config"]:
        model.set_experts_implementation("eager")
    model.name_or_path = "random"
    # The folder does not exist, so that the settings of the pixels are the defaults.
    pixels = family.pixels(Path("/nonexistent"), {"model_type": family_name}, native)
    pixels = pixels.in_mode(MODE) if pixels.in_mode else pixels
    return with_lora(model, family, native, pixels, tiles)


def with_lora(
    model: Any,
    family: Family,
    native: dict[str, Any],
    pixels: Pixels,
    tiles: Tiles,
    targets: str = LoraOptions.target_modules,
) -> RandomModel:
    """Adds LoRA of rank 8, both of whose matrices are random, so that both have gradients."""
    tuned = add_lora(model, family, LoraOptions(target_modules=targets)).train()
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.02)
    views = tuple(torch.zeros(count, 3, side, side) for count, side in pixels.sizes(tiles))
    inputs = moved(pixels.inputs([views], [tiles]), model.get_input_embeddings().weight)
    with torch.no_grad():
        image_tokens = len(encode_images(family, model, inputs, [tiles]))
    return RandomModel(native, family, model, tuned, pixels, tiles, image_tokens)


def native_config(name: str, scale: str, image_size: int = 384) -> dict[str, Any]:
    """Keyword arguments for the config of the family's class.

    The LLM is Llama, or DeepSeek-V2 with plain attention where there are experts. The patches of
    a tiny model are large, so that they are few. The scale may also be a published model of the
    family, e.g. deepseek-vl-1.3b-chat; the size of images is then its own.
    """
    if scale not in SCALES:
        config = find_published(scale).config
        family, _ = find_family(config, place=scale)
        return family.native_config(config, config["language_config"]["vocab_size"] - 1)
    if name == "deepseek-ocr":
        return _ocr_config(tiny=scale == "tiny")
    tiny, experts, sam = scale == "tiny", name == "deepseek-vl2", name == "deepseek-vl-hybrid"
    small = experts or sam
    vocab_size, heads = (512, 4) if tiny else (51200, 8)
    text: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 64 if tiny else 512,
        "intermediate_size": 96 if tiny else 1408,
        "num_hidden_layers": 2 if tiny else 6 if small else 8,
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    if experts:
        text |= {
            "n_routed_experts": 8 if tiny else 32, "num_experts_per_tok": 3 if tiny else 6,
            "moe_intermediate_size": 32 if tiny else 256,
            "n_shared_experts": 2, "first_k_dense_replace": 1,
            "topk_method": "greedy", "use_mla": False,
        }  # fmt: skip
    vision_size = 32 if tiny else 512
    vision = {
        "model_type": "siglip_vision_model", "vision_use_head": False,
        "hidden_size": vision_size, "intermediate_size": 4 * vision_size,
        "num_hidden_layers": 2 if tiny else 4 if small else 6, "num_attention_heads": heads,
        "image_size": image_size, "patch_size": 128 if tiny else 14 if experts else 16,
    }  # fmt: skip
    sam_vision = {
        "model_type": "sam_vision_model", "mlp_ratio": 4.0, "window_size": 14,
        "hidden_size": 32 if tiny else 256, "output_channels": 8 if tiny else 256,
        "num_hidden_layers": 2 if tiny else 4, "num_attention_heads": 4,
        "image_size": 1024, "patch_size": 128 if tiny else 16,
        "global_attn_indexes": [1] if tiny else [1, 3],
    }  # fmt: skip
    return {
        "text_config": text if experts else {"model_type": "llama", **text},
        "vision_config": vision,
        "image_token_id": vocab_size - 1,
        "tie_word_embeddings": False,
        **({"downsample_ratio": 2} if experts else {}),
        **({"high_res_vision_config": sam_vision} if sam else {}),
    }


def _ocr_config(*, tiny: bool) -> dict[str, Any]:
    """Keyword arguments for the config of DeepSeek-OCR's class, from the authors' fields."""
    vocab_size, heads = (512, 4) if tiny else (51200, 8)
    language = {
        "vocab_size": vocab_size, "hidden_size": 64 if tiny else 512,
        "intermediate_size": 96 if tiny else 1408, "moe_intermediate_size": 32 if tiny else 256,
        "num_hidden_layers": 2 if tiny else 6,
        "num_attention_heads": heads, "num_key_value_heads": heads,
        "n_routed_experts": 8 if tiny else 32, "num_experts_per_tok": 3 if tiny else 6,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "max_position_embeddings": 4096,
    }  # fmt: skip
    clip = 32 if tiny else 512
    sam = {
        "width": 32 if tiny else 256, "layers": 2 if tiny else 4, "heads": 4,
        "prompt_embed_dim": 16 if tiny else 256, "global_attn_indexes": [1] if tiny else [1, 3],
        "downsample_channels": [clip // 2, clip],
    }  # fmt: skip
    towers = {
        "sam_vit_b": sam,
        "clip-l-14-224": {"width": clip, "layers": 2 if tiny else 4, "heads": heads},
    }
    config = {"language_config": language, "vision_config": {"width": towers}}
    return DEEPSEEK_OCR.native_config(config, vocab_size - 1)
