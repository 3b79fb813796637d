"""The parts of Janus that draw: an image is a grid of codes, which the LLM predicts one by one.

text -> LLM -> generation head -> code -> generation embedding, aligner -> LLM -> next code, ...
all codes -> codebook -> VQ decoder -> image;     image -> VQ encoder -> nearest entry -> codes
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call
from torch.nn import functional as F

from vlft.families.base import ImageGenerator

if TYPE_CHECKING:
    from torch import Tensor, nn


def _embed(model: Any, codes: Tensor) -> Tensor:
    """(..., D) input embeddings of codes."""
    found: Tensor = model.model.generation_aligner(model.model.generation_embeddings(codes))
    return found


def _decode(model: Any, codes: Tensor) -> Tensor:
    """(I, 3, H, W) float32 images of codes (I, K); -1 is black, 1 is white."""
    found: Tensor = model.model.vqmodel.decode(codes)
    return found.float()


def _encode(model: Any, pixels: Tensor) -> Tensor:
    """(I, K) int64 codes of images (I, 3, H, W).

    As in the authors' code, the nearest entry is that of the largest cosine. The class of
    transformers compares vectors that are not normalised, and finds other codes for half of them.
    Computed in float32 whatever the model's dtype, as codes are targets for good.
    """
    vq = model.model.vqmodel
    with torch.autocast(pixels.device.type, enabled=False):
        latent = _in_float32(vq.quant_conv, _in_float32(vq.encoder, pixels.float()))
        rows = F.normalize(latent, dim=1).flatten(2).transpose(1, 2)
        book = F.normalize(vq.quantize.embedding.weight.float(), dim=1)
        found: Tensor = (rows @ book.T).argmax(-1)
    return found


def _in_float32(module: nn.Module, inputs: Tensor) -> Tensor:
    """The output of a module as if its weights were float32."""
    weights = {name: weight.float() for name, weight in module.named_parameters()}
    found: Tensor = functional_call(module, weights, (inputs,))
    return found


GENERATOR = ImageGenerator(
    embed=_embed,
    head="model.generation_head",
    aligner="model.generation_aligner",
    coder="model.vqmodel",
    decode=_decode,
    encode=_encode,
)
