"""A random DeepSeek-VL with LoRA, and random samples of a given shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

from vlft.data.encode import IGNORE, EncodedImage, EncodedSample
from vlft.families.deepseek_vl import FAMILY
from vlft.training.lora import LoraOptions, add_lora

SYSTEM_TOKENS = 45
QUESTION_TOKENS = 20
ANSWER_TOKENS = 24
BOS = 1


@dataclass(frozen=True)
class Shape:
    """Sizes of the model.

    Attributes:
        vocabulary: tokens; the last one marks images.
        hidden: width of the LLM.
        intermediate: width of its feed-forward layers.
        layers: of the LLM.
        heads: of the LLM.
        vision_width: of the SigLIP tower.
        vision_layers: of the tower.
        image_size: pixels.
        patch_size: pixels.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_width: int
    vision_layers: int
    image_size: int = 384
    patch_size: int = 16

    @property
    def image_token_id(self) -> int:
        """Id of the token that marks images."""
        return self.vocabulary - 1

    @property
    def image_tokens(self) -> int:
        """Tokens per image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Workload:
    """The samples of one optimiser step.

    Attributes:
        samples: all of equal length, so that a padded batch of them wastes nothing.
        pixels: image key -> (3, H, W) in the model's dtype.
        image_token_id: marks the tokens that are images.
        targets: trained tokens of all samples.
    """

    samples: list[EncodedSample]
    pixels: dict[str, Tensor]
    image_token_id: int
    targets: int


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A model with random weights, frozen, and LoRA on the LLM's q, k, v in float32.

    Both matrices of LoRA are random, so that both have gradients.

    Returns:
        transformers' model and peft's model around it.
    """
    torch.manual_seed(0)
    model = DeepseekVLForConditionalGeneration._from_config(
        _config(shape), dtype=dtype, attn_implementation="sdpa"
    )
    model.requires_grad_(False).to(device)
    model.name_or_path = "random"
    tuned = add_lora(model, FAMILY, LoraOptions())
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model, tuned.train()


def random_workload(
    shape: Shape, samples: int, questions: int, dtype: torch.dtype, device: torch.device
) -> Workload:
    """``samples`` samples with ``questions`` of them on each image.

    A sample is BOS, system prompt (common to all), image, question, answer (trained).
    """
    generator = torch.Generator().manual_seed(questions)

    def text(length: int) -> Tensor:
        return torch.randint(2, shape.vocabulary - 1, (length,), generator=generator)

    system = torch.cat([torch.tensor([BOS]), text(SYSTEM_TOKENS)])
    image_run = torch.full((shape.image_tokens,), shape.image_token_id)
    made: list[EncodedSample] = []
    for index in range(samples):
        prompt = torch.cat([system, image_run, text(QUESTION_TOKENS)])
        answer = text(ANSWER_TOKENS)
        key = f"image {index // questions}"
        labels = torch.cat([torch.full_like(prompt, IGNORE), answer])
        image = EncodedImage(Path(key), key, shape.image_tokens)
        made.append(EncodedSample(torch.cat([prompt, answer]), labels, "", (image,)))
    size = (3, shape.image_size, shape.image_size)
    pixels = {
        image.key: torch.randn(size, generator=generator).to(device, dtype)
        for image in dict.fromkeys(sample.images[0] for sample in made)
    }
    return Workload(made, pixels, shape.image_token_id, samples * ANSWER_TOKENS)


def _config(shape: Shape) -> DeepseekVLConfig:
    text = {
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": shape.vision_width,
        "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": 16,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "vision_use_head": False,
    }
    return DeepseekVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=shape.image_token_id,
        tie_word_embeddings=False,
    )
