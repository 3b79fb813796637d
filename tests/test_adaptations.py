"""What vlft changes in others' modules keeps results, can be undone, and is still needed."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    GOLDEN,
    HYBRID,
    OCR,
    OCR2,
    ONE_EACH,
    SIGLIP,
    VL2_MHA,
    VL2_MLA,
    VL2_NOAUX,
    make_rows,
    only_siglip,
)  # fmt: skip
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from tolerances import assert_close
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, SamVisionConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention
from transformers.utils import TransformersKwargs

from vlft.checkpoints.load import empty_model
from vlft.inference.features import Features
from vlft.inference.prefill import SharedPrompts
from vlft.models import adaptations
from vlft.models.adaptations import (
    HEAD_BY_HEAD,
    HeadByHead,
    _cast_once,
    _keep_gate_and_up,
    prepare_for_inference,
    prepare_for_training,
    restore,
)
from vlft.models.cache_name import CACHE
from vlft.models.tree_attention import TREE
from vlft.packing.prefix_tree import pack
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.loss import PackedLoss
from vlft.vision.encode import pixels_of

on_hybrid = pytest.mark.parametrize("case", [HYBRID], indirect=True, scope="session", ids=str)


def state(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """All that an adaptation may change, by module."""
    found = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        attention = getattr(config, "_attn_implementation", None)
        experts = getattr(config, "_experts_implementation", None)
        replaced = (vars(module).get(name) for name in ("forward", "_cast_input_dtype"))
        methods = [getattr(method, "func", None) for method in replaced]
        found[name] = (type(module), *methods, attention, experts)
    return found


@pytest.fixture
def language(folder) -> str:
    return folder.family.parts.language


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("case", [*ONE_EACH, VL2_MHA], indirect=True, scope="session", ids=str)
class TestPrepareAndRestore:
    def test_restored_is_as_transformers_builds_it(self, model, folder, language):
        config = type(model).config_class(**folder.native_config())
        published = state(type(model)._from_config(config, attn_implementation="sdpa"))
        prepare_for_training(model, language)
        assert state(model) != published
        restore(model)
        assert state(model) == published

    def test_twice_is_once(self, model, language):
        prepare_for_training(model, language)
        once = state(model)
        prepare_for_training(model, language)
        assert state(model) == once
        restore(model)
        restored = state(model)
        restore(model)
        assert state(model) == restored

    def test_a_loaded_model_is_prepared_for_inference(self, model):
        loaded = state(model)
        restore(model)
        prepare_for_inference(model)
        assert state(model) == loaded

    def test_same_logits_at_each_stage(self, model, language, inputs):
        loaded = logits(model, inputs)
        prepare_for_training(model, language)
        assert torch.equal(logits(model, inputs), loaded)
        restore(model)
        assert_close(logits(model, inputs), loaded, "logits")

    def test_restoring_a_copy_leaves_the_model(self, model, language):
        prepare_for_training(model, language)
        prepared = state(model)
        other = copy.deepcopy(model)
        restore(other)
        assert state(model) == prepared
        assert TREE not in [values[3] for values in state(other).values()]


@pytest.mark.parametrize("attn", ["eager", "flex_attention"])
@only_siglip
def test_another_attention_of_the_llm_is_kept(folder, language, attn):
    model = empty_model(folder)
    model.get_submodule(language).config._attn_implementation = attn
    prepare_for_training(model, language)
    restore(model)
    assert model.get_submodule(language).config._attn_implementation == attn


@pytest.mark.parametrize("case", [VL2_NOAUX], indirect=True, scope="session", ids=str)
def test_lora_on_experts_becomes_pefts_own(model, folder, inputs, language):
    tuned = add_lora(model, folder.family, LoraOptions("experts", rank=4))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    prepare_for_training(model, language)
    prepared, expected = state(tuned), logits(tuned, inputs)
    restore(tuned)
    kinds = [type(m) for m in tuned.modules() if isinstance(m, ParamWrapper)]
    assert set(kinds) == {ParamWrapper}
    assert_close(logits(tuned, inputs), expected, "logits")
    prepare_for_training(model, language)
    assert {n: v[0] for n, v in state(tuned).items()} == {n: v[0] for n, v in prepared.items()}


class TestSamAttention:
    @pytest.mark.parametrize("relative", [True, False])
    @pytest.mark.parametrize("plain_class", HEAD_BY_HEAD)
    def test_same_output_and_gradients(self, plain_class, relative):
        torch.manual_seed(0)
        # All classes read the same fields.
        config = SamVisionConfig(
            hidden_size=48, num_attention_heads=3, image_size=80, patch_size=16,
            use_rel_pos=relative,
        )  # fmt: skip
        plain = plain_class(config, 0).double()
        for parameter in plain.parameters():
            nn.init.normal_(parameter, std=0.3)
        ours = HEAD_BY_HEAD[plain_class](config, 0).double()
        ours.load_state_dict(plain.state_dict())
        images = torch.randn(2, 5, 5, 48, dtype=torch.float64, requires_grad=True)
        weights = torch.randn_like(images)
        found = []
        for module in (plain, ours):
            output, _ = module(images)
            inputs = [images, *module.parameters()]
            found.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
        assert_close(found[1], found[0], "float64")

    @on_hybrid
    def test_layers_with_global_attention_compute_one_head_at_a_time(self, model, monkeypatch):
        layers = model.model.high_res_vision_model.vision_encoder.layers
        assert {layer.window_size == 0 for layer in layers} == {True, False}
        for layer in layers:
            assert isinstance(layer.attn, HeadByHead) == (layer.window_size == 0)
        config = model.config.high_res_vision_config
        heads = len(config.global_attn_indexes) * config.num_attention_heads
        assert heads_per_bias(model, monkeypatch) == [1] * heads


def heads_per_bias(model, monkeypatch) -> list[int]:
    """Number of heads of each position bias that layers with global attention make."""
    heads = []
    layers = model.model.high_res_vision_model.vision_encoder.layers
    whole = [layer.attn for layer in layers if layer.window_size == 0]
    original = SamVisionSdpaAttention.get_decomposed_rel_pos

    def bias(self, query, *rest):
        if self in whole:
            heads.append(len(query))
        return original(self, query, *rest)

    monkeypatch.setattr(SamVisionSdpaAttention, "get_decomposed_rel_pos", bias)
    side = model.config.high_res_vision_config.image_size
    model.model.high_res_vision_model(torch.zeros(1, 3, side, side))
    return heads


class TestLastLayer:
    def test_a_repeated_position_gets_the_same_gradient_every_time(self):
        """Bit by bit, with several threads, or else a resumed run would end in other weights."""
        hidden = torch.randn(1, 900, 128, requires_grad=True)
        positions = torch.randint(0, 30, (900,)).sort().values
        upstream = torch.randn(1, 900, 128)
        layer = nn.Module()
        layer.self_attn = lambda hidden_states: (hidden_states, None)
        layer.input_layernorm = layer.post_attention_layernorm = layer.mlp = nn.Identity()
        language = nn.Module()
        language.layers = nn.ModuleList([layer])
        language.config = SimpleNamespace(_attn_implementation="eager")
        prepare_for_training(language, "")
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            found = []
            for _ in range(300):
                output = layer(hidden, positions_to_keep=positions)
                found.append(torch.autograd.grad(output, hidden, upstream)[0])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(gradient, found[0]) for gradient in found)

    @pytest.mark.parametrize(
        "case", [SIGLIP, VL2_MHA, VL2_MLA, OCR, OCR2], indirect=True, scope="session", ids=str
    )
    def test_attention_has_the_queries_of_targets_alone(
        self, case, model, folder, processor, language
    ):
        """In every family; with another attention of the LLM it has all, and the same loss."""
        samples = [processor.encode(row, GOLDEN / "images") for row in make_rows(5, case)]
        row = pack(samples, processor.chat.image_token_id)
        images = pixels_of(row.images, processor)
        objective = PackedLoss(model, folder.family)
        decoder, queries = model.get_submodule(language), []
        decoder.layers[-1].self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs: queries.append(inputs[0].shape[1])
        )
        loss = objective(row, images)
        decoder.config._attn_implementation = "sdpa"
        assert_close(loss, objective(row, images), "loss")
        assert queries == [len(row.source), len(row)]

    @pytest.mark.parametrize(
        "case", [SIGLIP, VL2_MHA, VL2_MLA, OCR, OCR2], indirect=True, scope="session", ids=str
    )
    @pytest.mark.parametrize("chunk", [None, 40])
    def test_prompts_need_its_keys_and_values_alone(
        self, case, shared_model, processor, language, monkeypatch, chunk
    ):
        """They are those of the whole layer, to the last bit."""
        prompts = [processor.encode(row, GOLDEN / "images") for row in make_rows(5, case)]
        layer, computed = shared_model.get_submodule(language).layers[-1], []
        hooks = [
            module.register_forward_pre_hook(lambda *_: computed.append(1))
            for module in (layer.self_attn, layer.mlp)
        ]
        features = Features(shared_model, processor)
        ours = SharedPrompts(shared_model, processor, prompts, features, chunk)
        assert not computed
        monkeypatch.setattr(adaptations, "can_narrow", lambda _: False)
        whole = SharedPrompts(shared_model, processor, prompts, features, chunk)
        for hook in hooks:
            hook.remove()
        assert computed
        assert "forward" not in vars(layer)
        for number in range(len(prompts)):
            caches = (prompts.inputs([number])[CACHE].layers for prompts in (ours, whole))
            for one, other in zip(*caches, strict=True):
                assert torch.equal(one.keys, other.keys)
                assert torch.equal(one.values, other.values)


def kept_bytes(module, hidden, weights) -> tuple[int, list[torch.Tensor]]:
    """Bytes that autograd keeps of a call of a module, and its output with all gradients."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        output = module(hidden)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((output * weights).sum(), [hidden, *trained])
    own = {parameter.data_ptr() for parameter in module.parameters()}
    return sum(t.nbytes for address, t in kept.items() if address not in own), [output, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_part_keeps_two_of_three_tensors_and_has_the_same_bits(dtype):
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=96)).to(dtype)
    mlp.requires_grad_(False)
    hidden = torch.randn(1, 50, 32, dtype=dtype, requires_grad=True)
    weights = torch.randn(1, 50, 32, dtype=dtype)
    plain, expected = kept_bytes(mlp, hidden, weights)
    _keep_gate_and_up(mlp)
    ours, found = kept_bytes(mlp, hidden, weights)
    assert (plain, ours) == (3 * 50 * 96 * dtype.itemsize, 2 * 50 * 96 * dtype.itemsize)
    assert all(map(torch.equal, found, expected))


class Sum(nn.ModuleList):
    """The sum of layers that read the same input, as q, k and v do."""

    def forward(self, hidden):
        return sum(layer(hidden) for layer in self)


def test_lora_under_autocast_keeps_its_input_once():
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False)
    bases = [nn.Linear(32, 48, dtype=torch.bfloat16).requires_grad_(False) for _ in range(3)]
    layers = Sum(LoraLinear(base, "default", config, r=4, lora_alpha=8) for base in bases)
    for layer in layers:  # As peft's get_peft_model leaves them.
        layer.lora_A.float()
        layer.lora_B.float()
    hidden = torch.randn(1, 50, 32, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(1, 50, 48, dtype=torch.bfloat16)
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(kept_bytes(layers, hidden, weights))
        _cast_once(layers)
    (plain, expected), (ours, made) = found
    assert plain - ours == 2 * hidden.nbytes
    assert torch.equal(made[0], expected[0])
    # The contributions to the input's gradient are rounded to 16 bit in another order.
    for tensor, other in zip(made[1:], expected[1:], strict=True):
        assert (tensor.float() - other.float()).norm() < 0.01 * other.float().norm()


class TestStillNeeded:
    """Each fails once an adaptation can go; test_experts.py has those of the experts."""

    @on_hybrid
    def test_transformers_makes_the_bias_of_all_heads_at_once(self, model, monkeypatch):
        restore(model)
        config = model.config.high_res_vision_config
        expected = [config.num_attention_heads] * len(config.global_attn_indexes)
        assert heads_per_bias(model, monkeypatch) == expected

    @only_siglip
    def test_sdpa_scores_every_pair_of_a_row(self, model, folder, processor, monkeypatch):
        samples = [processor.encode(row, GOLDEN / "images") for row in make_rows(5)]
        row = pack(samples, processor.chat.image_token_id, share=False)
        images = pixels_of(row.images, processor)
        objective = PackedLoss(model, folder.family)
        scored = count_scores(monkeypatch)
        loss = objective(row, images)
        ours = sum(scored)
        scored.clear()
        # The same row with the dense mask, by transformers' own attention.
        model.get_submodule(folder.family.parts.language).config._attn_implementation = "sdpa"
        assert_close(objective(row, images), loss, "loss")
        assert sum(scored) == model.config.text_config.num_hidden_layers * len(row) ** 2
        assert ours < 0.3 * sum(scored)

    def test_flex_attention_has_no_backward_pass_on_the_cpu(self):
        query = torch.randn(1, 1, 128, 16, requires_grad=True)
        with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
            flex_attention(query, query, query)

    @only_siglip
    def test_transformers_decoder_takes_no_positions(self, model, language):
        restore(model)
        arguments = {*inspect.signature(LlamaModel.forward).parameters}
        assert not [n for n in arguments | {*TransformersKwargs.__annotations__} if "keep" in n]
        decoder = model.get_submodule(language)
        seen = []
        decoder.layers[-1].mlp.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].shape[1])
        )
        positions = torch.tensor([3, 5])
        ids = torch.arange(9).unsqueeze(0)
        decoder(ids, use_cache=False, logits_to_keep=positions, positions_to_keep=positions)
        assert seen == [9]


def count_scores(monkeypatch) -> list[int]:
    """A list that gets the number of scores of each later call of SDPA, unless it attends fully."""
    scored = []
    original = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, *rest, attn_mask=None, is_causal=False, **settings):
        if attn_mask is not None or is_causal:
            scored.append(query.shape[-2] * key.shape[-2])
        return original(query, key, *rest, attn_mask=attn_mask, is_causal=is_causal, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    return scored
