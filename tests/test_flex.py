"""FlexAttention over packed rows: equal to tree attention, in a bounded number of versions.

torch has no backward pass of it on the CPU. Gradients are compared with its definition, in which
every score of the mask is computed; what a GPU's kernel gives is compared by tests/test_cuda.py.
"""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN, SIGLIP, VL2_MLA, make_rows
from tolerances import assert_close
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from vlft.checkpoints.load import load_model
from vlft.checkpoints.placement import Placement
from vlft.models import flex
from vlft.models.flex import padded_length
from vlft.packing.attention import block_mask
from vlft.packing.prefix_tree import pack
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.loss import PackedLoss
from vlft.training.model import set_checkpointing
from vlft.vision.encode import pixels_of

# That it is not compiled.
UNCOMPILED = pytest.mark.filterwarnings("ignore")
FAMILIES = pytest.mark.parametrize("case", [SIGLIP, VL2_MLA], indirect=True, ids=str)


def by_definition(query, key, value, *, block_mask, scale):
    """FlexAttention's output with a backward pass, from the rule of the mask alone."""
    index = torch.arange(query.shape[2])
    seen = block_mask.mask_mod(None, None, index[:, None], index[None, :])
    scores = (query @ key.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.fixture
def rows(case, processor):
    samples = [processor.encode(row, GOLDEN / "images") for row in make_rows(5, case)]
    token = processor.chat.image_token_id
    made = [pack(part, token) for part in (samples, samples[:2])]
    return [(row, pixels_of(row.images, processor)) for row in made]


@pytest.fixture
def objective(folder):
    """A function that gives the loss of a model with LoRA, by the name of its attention."""

    def make(attn):
        placement = Placement(torch.device("cpu"), torch.float32, attn=attn)
        model = load_model(folder, placement)
        torch.manual_seed(0)
        add_lora(model, folder.family, LoraOptions("ALL", rank=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return PackedLoss(model, folder.family).train()

    return make


@UNCOMPILED
@FAMILIES
def test_the_loss_is_that_of_tree_attention(rows, objective, monkeypatch):
    """By torch's own FlexAttention; MLA has keys and values of two widths."""
    monkeypatch.setattr(flex, "compiled", lambda: flex_attention)
    expected, found = objective("sdpa"), objective("flex")
    with torch.no_grad():
        for row, images in rows:
            assert_close(found(row, images), expected(row, images), "loss")


@FAMILIES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_tree_attention(rows, objective, monkeypatch, checkpointing):
    seen = []

    def attend(query, key, value, **options):
        seen.append(query.shape[2])
        return by_definition(query, key, value, **options)

    monkeypatch.setattr(flex, "compiled", lambda: attend)
    found = []
    for attn in ("sdpa", "flex"):
        made = objective(attn)
        set_checkpointing(made.model, on=checkpointing and attn == "flex")
        for row, images in rows:
            made(row, images).backward()
        named = made.model.named_parameters()
        found.append({n: p.grad for n, p in named if p.grad is not None})
    assert_close(found[1], found[0], "gradients")
    layers = made.model.config.text_config.num_hidden_layers
    # The last layer is never checkpointed.
    again = (layers - 1) * checkpointing
    assert seen == [flex.SHORTEST] * len(rows) * (layers + again)
    assert all(len(row) < flex.SHORTEST for row, _ in rows)


def test_lengths_are_few():
    lengths = [padded_length(tokens) for tokens in range(1, 8193)]
    assert sorted(set(lengths)) == [1024, 1536, 2048, 3072, 4096, 6144, 8192]
    assert all(tokens <= length for tokens, length in enumerate(lengths, 1))
    assert all(length <= 1.5 * tokens for tokens, length in enumerate(lengths, 1) if tokens > 1024)


@UNCOMPILED
def test_compiled_code_is_one_version_for_each_padded_length(monkeypatch):
    """Also after more lengths than torch keeps versions of without vlft."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "MOST_VERSIONS", 4)
    flex.compiled.cache_clear()
    counter = CompileCounter()
    monkeypatch.setattr(flex, "SHORTEST", 64)
    # Not by monkeypatch, which deletes the setting when it restores it.
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        flex.compiled()
        compiled = torch.compile(flex_attention, dynamic=False, backend=counter)
        monkeypatch.setattr(flex, "compiled", lambda: compiled)
        for tokens in (3, 60, 64, 65, 90, 97, 100, 128):
            query = torch.zeros(1, 2, tokens, 8)
            row = block_mask(torch.full((tokens,), tokens), None, padded_length(tokens))
            flex.row_attention(torch.nn.Module(), query, query, query, None, row=row)
    assert {padded_length(tokens) for tokens in (3, 65, 128)} == {64, 96, 128}
    assert counter.frame_count == 3
    torch._dynamo.reset()
