"""The SAM tower's attention head by head is that of all heads."""

from __future__ import annotations

import pytest
import torch
from conftest import HYBRID
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

from vlft.models.sam_attention import HeadByHead


@pytest.mark.parametrize("relative", [True, False])
def test_same_output_and_gradients(relative):
    torch.manual_seed(0)
    config = SamVisionConfig(
        hidden_size=48, num_attention_heads=3, image_size=80, patch_size=16, use_rel_pos=relative
    )
    plain = SamVisionSdpaAttention(config, 0).double()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = HeadByHead(config, 0).double()
    ours.load_state_dict(plain.state_dict())
    images = torch.randn(2, 5, 5, 48, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(images)
    found = []
    for module in (plain, ours):
        output, _ = module(images)
        inputs = [images, *module.parameters()]
        found.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("case", [HYBRID], indirect=True, ids=str)
def test_layers_that_see_the_whole_image_do_so(model, monkeypatch):
    layers = model.model.high_res_vision_model.vision_encoder.layers
    assert {layer.window_size == 0 for layer in layers} == {True, False}
    for layer in layers:
        assert isinstance(layer.attn, HeadByHead) == (layer.window_size == 0)
    sizes = []
    original = HeadByHead.get_decomposed_rel_pos

    def bias(self, query, *rest):
        sizes.append(len(query))
        return original(self, query, *rest)

    monkeypatch.setattr(HeadByHead, "get_decomposed_rel_pos", bias)
    config = model.config.high_res_vision_config
    model.model.high_res_vision_model(torch.zeros(1, 3, config.image_size, config.image_size))
    whole = sum(layer.window_size == 0 for layer in layers)
    assert sizes == [1] * whole * config.num_attention_heads
