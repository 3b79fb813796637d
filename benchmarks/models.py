"""A model with random weights and LoRA, of a given shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlft.families.base import encode_images
from vlft.families.registry import FAMILIES
from vlft.models.adaptations import prepare_for_inference
from vlft.training.lora import LoraOptions, add_lora
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from benchmarks.shapes import LargeTower, Shape
    from vlft.families.base import Family, Pixels, Tiles

SEED = 0


@dataclass(frozen=True)
class RandomModel:
    """A model in memory.

    Attributes:
        shape: its sizes.
        family: of the model.
        model: transformers' class, with LoRA in place.
        tuned: peft's model around it.
        pixels: how images become its inputs.
        image_tokens: that an image becomes.
    """

    shape: Shape
    family: Family
    model: Any
    tuned: Any
    pixels: Pixels
    image_tokens: int

    @property
    def language(self) -> Any:
        """The LLM."""
        return self.model.get_submodule(self.family.parts.language)

    @property
    def weight(self) -> torch.Tensor:
        """(V, D) embeddings of tokens: device and dtype of the frozen weights."""
        embeddings: torch.Tensor = self.model.get_input_embeddings().weight
        return embeddings

    def precision(self) -> torch.autocast:
        """What Accelerate does for a model of this dtype."""
        weight = self.weight
        half = weight.dtype is torch.bfloat16
        return torch.autocast(weight.device.type, torch.bfloat16, enabled=half)


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> RandomModel:
    """A frozen model with LoRA of rank 8 on the LLM's q, k, v in float32.

    Both matrices of LoRA are random, so that both have gradients.
    """
    torch.manual_seed(SEED)
    family = next(family for family in FAMILIES if family.name == shape.family)
    native = native_config(shape)
    cls = family.model_class()
    config = cls.config_class(**native)
    model = cls._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False).to(device)
    prepare_for_inference(model)
    model.name_or_path = "random"
    tuned = add_lora(model, family, LoraOptions()).train()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    # Of a folder that does not exist: all numbers are at their defaults.
    pixels = family.pixels(Path("/nonexistent"), {"model_type": shape.family}, native)
    tokens = count_image_tokens(family, model, pixels, shape.tiles)
    return RandomModel(shape, family, model, tuned, pixels, tokens)


@torch.no_grad()
def count_image_tokens(family: Family, model: Any, pixels: Pixels, tiles: Tiles) -> int:
    """The features that an image becomes, each in the place of a token."""
    views = torch.zeros(1 + tiles[0] * tiles[1], 3, pixels.size, pixels.size)
    inputs = moved(pixels.inputs(views, [tiles]), model.get_input_embeddings().weight)
    return len(encode_images(family, model, inputs, [tiles]))


def native_config(shape: Shape) -> dict[str, Any]:
    """The keyword arguments of the config of the family's class."""
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "vision_use_head": False,
    }
    native: dict[str, Any] = {
        "text_config": text_config(shape),
        "vision_config": vision,
        "image_token_id": shape.image_token_id,
        "tie_word_embeddings": False,
    }
    if shape.experts:
        native["downsample_ratio"] = 2
    if shape.large_tower:
        native["high_res_vision_config"] = large_tower_config(shape.large_tower)
    return native


def text_config(shape: Shape) -> dict[str, Any]:
    """The LLM's: Llama, or DeepSeek-V2 with plain attention where there are experts."""
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    if shape.experts is None:
        return {"model_type": "llama", **text}
    return {
        **text,
        "use_mla": False,
        "topk_method": "greedy",
        "first_k_dense_replace": shape.experts.dense,
        "n_routed_experts": shape.experts.routed,
        "num_experts_per_tok": shape.experts.best,
        "n_shared_experts": shape.experts.shared,
        "moe_intermediate_size": shape.experts.width,
    }


def large_tower_config(tower: LargeTower) -> dict[str, Any]:
    """The SAM tower's."""
    return {
        "model_type": "sam_vision_model",
        "hidden_size": tower.width,
        "output_channels": tower.channels,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "global_attn_indexes": list(range(1, tower.layers, 2)),
        "mlp_ratio": 4.0,
        "window_size": 14,
    }
