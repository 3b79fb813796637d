"""Routing and experts: the grouped products against the plain computation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, VL2_MHA, VL2_MLA, VL2_NOAUX
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F

from vlft.checkpoints.adapter import save_adapter
from vlft.checkpoints.load import load_model
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.quantize import quantized_weight
from vlft.errors import ConfigError
from vlft.models.deepseek_vl2 import DeepseekVL2Config, DeepseekVL2TextConfig
from vlft.models.deepseek_vl2.modeling import Projector
from vlft.models.deepseek_vl2.text import Router, SparseMLP
from vlft.models.experts import (
    IMPLEMENTATION,
    PLAIN_EXPERTS,
    Experts4bit,
    ParamWrapper,
    Product4bit,
)
from vlft.models.four_bit import dequantized, dequantized_parts
from vlft.models.grouped import Groups, loops_over_groups
from vlft.training.lora import LoraOptions, add_lora, resolve_targets

CPU = Placement(torch.device("cpu"), torch.float32)
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 64, 32, 3


def config_of(**settings) -> DeepseekVL2TextConfig:
    config = DeepseekVL2TextConfig(
        **{
            "hidden_size": HIDDEN,
            "moe_intermediate_size": INTERMEDIATE,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 2,
            "num_experts_per_tok": TOP_K,
            "topk_method": "greedy",
            **settings,
        }
    )
    config._experts_implementation = IMPLEMENTATION
    return config


def sparse_mlp(**settings) -> SparseMLP:
    torch.manual_seed(0)
    layer = SparseMLP(config_of(**settings))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer


def one_by_one(layer: SparseMLP, hidden: torch.Tensor) -> torch.Tensor:
    """The output of the layer, computed in a loop over tokens and experts."""
    _, weights, chosen = layer.gate(hidden)
    rows = []
    for token in range(len(hidden)):
        total = layer.shared_experts(hidden[token])
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            both = layer.experts.gate_up_proj[expert] @ hidden[token]
            inner = F.silu(both[:INTERMEDIATE]) * both[INTERMEDIATE:]
            total = total + weight * (layer.experts.down_proj[expert] @ inner)
        rows.append(total)
    return torch.stack(rows)


class TestRouter:
    def scores(self, router, hidden):
        return (hidden @ router.weight.detach().T).double()

    def router(self, **settings):
        router = Router(config_of(**settings))
        torch.manual_seed(1)
        for parameter in router.parameters():
            nn.init.normal_(parameter)
        return router, torch.randn(50, HIDDEN)

    def test_greedy(self):
        router, hidden = self.router()
        _, weights, chosen = router(hidden)
        scores = self.scores(router, hidden).softmax(-1)
        for token in range(50):
            best = sorted(range(EXPERTS), key=lambda e: -scores[token, e])[:TOP_K]
            assert sorted(chosen[token].tolist()) == sorted(best)
        assert_close(weights.double(), scores.gather(-1, chosen), "layer")
        assert not torch.allclose(weights.sum(-1), torch.ones(50), atol=1e-2)

    @pytest.mark.parametrize("method", ["group_limited_greedy", "noaux_tc"])
    def test_groups(self, method):
        """Four groups of two experts, two of which are chosen first."""
        scoring = "softmax" if method == "group_limited_greedy" else "sigmoid"
        router, hidden = self.router(
            topk_method=method, scoring_func=scoring, n_group=4, topk_group=2
        )
        _, weights, chosen = router(hidden)
        logits = self.scores(router, hidden)
        scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
        chooser = scores + (router.e_score_correction_bias.detach() if method == "noaux_tc" else 0)
        best = 1 if method == "group_limited_greedy" else 2
        for token in range(50):
            groups = [sorted(chooser[token, 2 * g : 2 * g + 2].tolist())[-best:] for g in range(4)]
            kept = sorted(range(4), key=lambda g: -sum(groups[g]))[:2]
            # An expert outside the chosen groups scores zero, which may exceed a negative score.
            masked = [float(chooser[token, e]) if e // 2 in kept else 0.0 for e in range(EXPERTS)]
            wanted = sorted(range(EXPERTS), key=lambda e: -masked[e])[:TOP_K]
            found = [sorted(masked[e] for e in best) for best in (chosen[token].tolist(), wanted)]
            assert_close(*map(torch.tensor, found), "layer")
        assert_close(weights.double(), scores.gather(-1, chosen), "layer")

    @pytest.mark.parametrize("norm", [False, True])
    def test_a_group_of_fewer_experts_than_are_chosen(self, norm):
        """As in transformers' V2 router, those of other groups have no weight."""
        settings = {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}
        router, hidden = self.router(
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=norm,
            **settings,
        )
        _, weights, chosen = router(hidden)
        scores = self.scores(router, hidden).softmax(-1)
        best = scores.argmax(-1, keepdim=True) // 2
        kept = torch.arange(EXPERTS) // 2 == best
        expected = scores * kept / (scores * kept).sum(-1, keepdim=True) if norm else scores * kept
        found = torch.zeros(50, EXPERTS).scatter(-1, chosen, weights)
        assert_close(found.double(), expected, "layer")

    def test_normalised_and_scaled(self):
        router, hidden = self.router(norm_topk_prob=True, routed_scaling_factor=2.5)
        _, weights, _ = router(hidden)
        assert_close(weights.sum(-1), torch.full((50,), 2.5), "layer")

    def test_float32_in_any_precision(self):
        router, hidden = self.router()
        _, expected, _ = router(hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, found, _ = router(hidden)
        assert torch.equal(found, expected)


class TestGroupedProducts:
    @pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
    def test_same_as_one_by_one(self, scoring):
        layer = sparse_mlp(scoring_func=scoring)
        hidden = torch.randn(20, HIDDEN)
        assert_close(layer(hidden), one_by_one(layer, hidden), "layer")

    def test_same_as_transformers_own(self):
        ours, theirs = sparse_mlp(), sparse_mlp()
        theirs.experts.config._experts_implementation = "grouped_mm"
        hidden = torch.randn(20, HIDDEN)
        assert_close(ours(hidden), theirs(hidden), "layer")

    def test_gradients_can_be_repeated_bit_by_bit(self):
        """With many rows per token, so that threads could add to a gradient in varying order."""
        layer, hidden = sparse_mlp(), torch.randn(500, HIDDEN)
        found = []
        for _ in range(5):
            inputs = hidden.clone().requires_grad_()
            layer(inputs).square().sum().backward()
            found.append(inputs.grad)
        assert all(torch.equal(found[0], other) for other in found)

    def test_autocast_reaches_the_experts(self, monkeypatch):
        """Trained weights are float32, their products under autocast bfloat16."""
        seen = []
        original = F.grouped_mm

        def watched(rows, weight, **settings):
            seen.append((rows.dtype, weight.dtype))
            return original(rows, weight, **settings)

        monkeypatch.setattr(F, "grouped_mm", watched)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sparse_mlp()(torch.randn(20, HIDDEN))
        assert seen == [(torch.bfloat16, torch.bfloat16)] * 2

    def test_groups_cover_every_row_once(self):
        chosen = torch.tensor([[3, 0], [0, 5], [3, 5]])
        groups = Groups.of(chosen, EXPERTS)
        assert groups.ends.tolist() == [2, 2, 2, 4, 4, 6, 6, 6]
        assert groups.slots.tolist() == [1, 2, 0, 4, 3, 5]
        assert groups.slots[groups.rows].tolist() == [0, 1, 2, 3, 4, 5]

    def test_unused_experts_get_no_gradient_and_no_error(self):
        layer = sparse_mlp()
        layer(torch.randn(1, HIDDEN)).sum().backward()
        gradients = layer.experts.gate_up_proj.grad.flatten(1).norm(dim=1)
        assert int((gradients > 0).sum()) == TOP_K


class TestLoop:
    """Where torch has no kernel; on the CPU it is told that it has none."""

    @pytest.mark.parametrize(
        ("capability", "dtype", "loops"),
        [
            *(((9, 0), torch.bfloat16, False), ((10, 0), torch.bfloat16, False)),
            *(((7, 0), torch.float16, True), ((8, 0), torch.bfloat16, True)),
            *(((8, 9), torch.bfloat16, True), ((12, 0), torch.bfloat16, True)),
            *(((9, 0), torch.float16, True), ((9, 0), torch.float32, True)),
        ],
    )
    def test_the_choice_by_capability(self, monkeypatch, capability, dtype, loops):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        assert loops_over_groups(torch.device("cuda"), dtype) == loops
        assert not loops_over_groups(torch.device("cpu"), dtype)

    @pytest.fixture
    def looping(self, monkeypatch):
        """All products are loops: torch's own fails, and reading from the device is counted."""

        def refuse(*_args, **_settings):
            raise AssertionError("torch's grouped product is used")

        reads = []
        original = torch.Tensor.tolist

        def tolist(tensor):
            reads.append(tensor.shape)
            return original(tensor)

        monkeypatch.setattr("vlft.models.experts.loops_over_groups", lambda *_: True)
        monkeypatch.setattr(F, "grouped_mm", refuse)
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        return reads

    @pytest.mark.parametrize("trained", ["experts", "lora"])
    def test_same_output_and_gradients(self, request, trained):
        """With some experts that no token chose, and one read of the host a layer and step."""

        def found():
            layer = sparse_mlp()
            hidden = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
            if trained == "lora":
                return run(tuned(layer, grouped=True, rank=3), hidden)
            inputs = hidden.requires_grad_()
            output = layer(inputs)
            output.square().sum().backward()
            return output, inputs.grad, {n: p.grad for n, p in layer.named_parameters()}

        expected = found()
        reads = request.getfixturevalue("looping")
        output, gradient, others = found()
        assert reads == [(EXPERTS,)]
        assert_close(output, expected[0], "layer")
        assert_close(gradient, expected[1], "layer gradients")
        assert_close(others, expected[2], "layer gradients")

    def test_4_bit(self, request):
        layer = Experts4bit(sparse_mlp().experts, torch.float32)
        for name in ("gate_up_proj", "down_proj"):
            weight = quantized_weight(layer, getattr(layer, name).data, torch.device("cpu"))
            layer.register_parameter(name, weight)
        chosen, weights = torch.tensor([[0, 5, 2]] * 20), torch.rand(20, TOP_K)

        def found():
            inputs = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
            output = layer(inputs.requires_grad_(), chosen, weights)
            output.square().sum().backward()
            return output, inputs.grad

        expected = found()
        assert request.getfixturevalue("looping") == []
        for ours, theirs in zip(found(), expected, strict=True):
            assert_close(ours, theirs, "layer gradients")

    def test_rows_of_frozen_weights_are_not_kept(self, looping):
        layer = sparse_mlp().requires_grad_(False)
        kept = []

        def keep(tensor):
            kept.append(tensor.shape)
            return tensor

        inputs = torch.randn(20, HIDDEN, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer.experts(inputs, *routes(20))
        # Gate and up, of the same shape, are those of the activation.
        assert 2 * INTERMEDIATE == HIDDEN
        assert kept.count((20 * TOP_K, HIDDEN)) == 1


class TestProjector:
    """It joins squares of four patches, ordered by channel, with zeros beyond the edge."""

    @pytest.mark.parametrize("side", [4, 5])
    def test_against_the_plain_computation(self, side):
        config = DeepseekVL2Config(
            vision_config={"hidden_size": 6, "num_attention_heads": 2},
            text_config={"hidden_size": 10, "num_attention_heads": 2},
            projector_depth=3,
            projector_mlp_ratio=2,
        )
        projector = Projector(config)
        assert [tuple(layer.weight.shape) for layer in projector.layers[::2]] == [
            (20, 24), (20, 20), (10, 20),
        ]  # fmt: skip
        features = torch.randn(2, side * side, 6)
        tokens = projector(features)
        half = -(-side // 2)
        assert tokens.shape == (2, half * half, 10)
        for row in range(half):
            for column in range(half):
                square = []
                for channel in range(6):
                    for y, x in itertools.product(
                        (2 * row, 2 * row + 1), (2 * column, 2 * column + 1)
                    ):
                        inside = y < side and x < side
                        square.append(
                            features[0, y * side + x, channel] if inside else torch.zeros(())
                        )
                expected = projector.layers(torch.stack(square))
                assert_close(tokens[0, row * half + column], expected, "layer")


def test_unused_experts_do_not_disturb_several_processes(tmp_path):
    """DDP fails in the step after one that left a parameter without a gradient."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tuned(sparse_mlp(), grouped=True)
        wrapped = nn.parallel.DistributedDataParallel(model.base_model.model["mlp"])
        for _ in range(3):
            wrapped(torch.randn(1, HIDDEN)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(gradient is not None for gradient in gradients)


def tuned(layer: nn.Module, *, grouped: bool, rank: int = 4) -> nn.Module:
    """The layer with LoRA on its experts; grouped is vlft's forward, else it is peft's."""
    config = LoraConfig(r=rank, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    if grouped:
        config._register_custom_module(dict.fromkeys((*PLAIN_EXPERTS, Experts4bit), ParamWrapper))
    model = get_peft_model(nn.ModuleDict({"mlp": layer}), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def run(model: nn.Module, hidden: torch.Tensor):
    """Output, gradient of the input, gradients of the adapter."""
    hidden = hidden.clone().requires_grad_()
    output = model.base_model.model["mlp"](hidden)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return output, hidden.grad, gradients


def saved_sizes(model: nn.Module, forward) -> list[int]:
    """The size of each tensor that is kept for the backward pass and is no parameter."""
    own = {p.data_ptr() for p in model.parameters()}
    sizes = []

    def keep(tensor):
        if tensor.data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sizes


class TestLoraOnExperts:
    @pytest.mark.parametrize("rank", [3, 8])
    def test_same_as_adding_to_the_weights(self, rank):
        hidden = torch.randn(20, HIDDEN)
        output, inputs, gradients = run(tuned(sparse_mlp(), grouped=True, rank=rank), hidden)
        expected = run(tuned(sparse_mlp(), grouped=False, rank=rank), hidden)
        assert_close(output, expected[0], "layer")
        assert_close(inputs, expected[1], "layer gradients")
        assert_close(gradients, expected[2], "layer gradients")

    def test_it_does_something(self):
        hidden = torch.randn(20, HIDDEN)
        plain = sparse_mlp()(hidden)
        assert (run(tuned(sparse_mlp(), grouped=True), hidden)[0] - plain).abs().max() > 0.1

    def test_nothing_as_large_as_the_weights_is_made(self):
        model = tuned(sparse_mlp(), grouped=True)
        largest = self.largest_saved(model, torch.randn(4, HIDDEN))
        assert largest < EXPERTS * INTERMEDIATE * HIDDEN / 2
        assert self.largest_saved(tuned(sparse_mlp(), grouped=False), torch.randn(4, HIDDEN)) > (
            2 * largest
        )

    def largest_saved(self, model, hidden):
        return max(saved_sizes(model, lambda: model.base_model.model["mlp"](hidden)))

    def test_disabled_and_merged(self):
        hidden = torch.randn(20, HIDDEN)
        model = tuned(sparse_mlp(), grouped=True)
        layer = model.base_model.model["mlp"]
        with_adapter = layer(hidden)
        with model.disable_adapter():
            assert_close(layer(hidden), sparse_mlp()(hidden), "layer")
        merged = model.merge_and_unload(safe_merge=True)["mlp"]
        assert type(merged.experts) in PLAIN_EXPERTS
        assert_close(merged(hidden), with_adapter, "layer")


def in_4bit(layer: SparseMLP) -> SparseMLP:
    experts = Experts4bit(layer.experts, torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(layer.experts, name).data
        setattr(experts, name, quantized_weight(experts, weight, torch.device("cpu")))
    layer.experts = experts
    return layer


class TestExpertsIn4bit:
    def plain_twin(self) -> SparseMLP:
        quantised, twin = in_4bit(sparse_mlp()), sparse_mlp()
        for name in ("gate_up_proj", "down_proj"):
            value = dequantized(getattr(quantised.experts, name))
            getattr(twin.experts, name).data = value.float()
        return twin

    @pytest.mark.parametrize("lora", [False, True])
    def test_same_as_with_the_dequantised_weights(self, lora):
        hidden = torch.randn(20, HIDDEN)
        quantised, twin = in_4bit(sparse_mlp()), self.plain_twin()
        if lora:
            found = run(tuned(quantised, grouped=True), hidden)
            expected = run(tuned(twin, grouped=True), hidden)
            assert_close(found[2], expected[2], "layer gradients")
            assert_close(found[1], expected[1], "layer gradients")
            assert_close(found[0], expected[0], "layer")
        else:
            assert_close(quantised(hidden), twin(hidden), "layer")
            assert_close(quantised(hidden), sparse_mlp()(hidden), "nf4")

    @pytest.fixture
    def _wide(self, monkeypatch):
        """Experts whose rows are whole blocks of equal scale, as those of published models."""
        monkeypatch.setitem(globals(), "INTERMEDIATE", 64)

    @pytest.mark.usefixtures("_wide")
    @pytest.mark.parametrize("lora", [False, True])
    def test_a_decoding_step_dequantises_the_experts_it_chose(self, lora, monkeypatch):
        import bitsandbytes as bnb

        hidden, counted = torch.randn(1, HIDDEN), []
        model = in_4bit(sparse_mlp())
        if lora:
            model = tuned(model, grouped=True).base_model.model["mlp"]
        expected = model(hidden).detach()
        original = bnb.functional.dequantize_4bit

        def counting(*args, **options):
            made = original(*args, **options)
            counted.append(made.numel())
            return made

        monkeypatch.setattr(bnb.functional, "dequantize_4bit", counting)
        with torch.no_grad():
            found = model(hidden)
            chosen = sum(counted)
            counted.clear()
            model(torch.randn(40, HIDDEN))
        assert_close(found, expected, "layer")
        assert counted[0] == 2 * counted[1] == EXPERTS * 2 * INTERMEDIATE * HIDDEN
        assert chosen == TOP_K * sum(counted) / EXPERTS

    @pytest.mark.usefixtures("_wide")
    @pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
    def test_the_values_of_chosen_experts_are_the_same(self, name):
        weight = getattr(in_4bit(sparse_mlp()).experts, name)
        chosen = torch.tensor([5, 0, 5])
        assert torch.equal(dequantized_parts(weight, chosen), dequantized(weight)[chosen])

    def test_dequantised_weights_are_not_kept_for_the_backward_pass(self):
        model = tuned(in_4bit(sparse_mlp()), grouped=True)
        largest = TestLoraOnExperts().largest_saved(model, torch.randn(4, HIDDEN))
        assert largest < EXPERTS * INTERMEDIATE * HIDDEN / 2

    def test_gradient_of_the_product(self):
        layer = in_4bit(sparse_mlp()).experts
        rows = torch.randn(6, HIDDEN, requires_grad=True)
        ends = torch.tensor([1, 1, 2, 3, 3, 5, 6, 6], dtype=torch.int32)
        Product4bit.apply(rows, ends, None, layer.gate_up_proj).sum().backward()
        twin = self.plain_twin().experts.gate_up_proj
        owner = torch.tensor([0, 2, 3, 5, 5, 6])
        assert_close(rows.grad, twin[owner].sum(1), "layer gradients")


class TestStillNeeded:
    """Reasons why transformers' and peft's experts are not used; a test fails once one is gone.

    ``test_nothing_as_large_as_the_weights_is_made`` has another: peft adds LoRA to all weights.
    """

    def layer(self, implementation: str) -> SparseMLP:
        layer = sparse_mlp()
        layer.experts.config._experts_implementation = implementation
        return layer.requires_grad_(False)

    def test_transformers_gathers_tokens_by_indexing(self):
        """The gradient of indexing is added up by several threads in no fixed order."""
        hidden = torch.randn(20, HIDDEN, requires_grad=True)
        assert "IndexBackward0" in graph(self.layer("grouped_mm").experts(hidden, *routes(20)))
        assert "IndexBackward0" not in graph(
            self.layer(IMPLEMENTATION).experts(hidden, *routes(20))
        )

    def test_transformers_keeps_more_for_the_backward_pass(self):
        assert self.kept("grouped_mm") > 1.3 * self.kept(IMPLEMENTATION)

    def kept(self, implementation: str) -> int:
        layer, hidden = self.layer(implementation), torch.randn(20, HIDDEN, requires_grad=True)
        return sum(saved_sizes(layer, lambda: layer.experts(hidden, *routes(20))))


def routes(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts chosen for each token, and their weights."""
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(3))
    weights, chosen = scores.topk(TOP_K)
    return chosen, weights


def graph(output: torch.Tensor) -> set[str]:
    """Names of the functions in the backward pass of a tensor."""
    names, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(type(node).__name__)
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    return names


mixtures = pytest.mark.parametrize(
    "case", [VL2_MHA, VL2_MLA, VL2_NOAUX], indirect=True, scope="session", ids=str
)


@mixtures
class TestInAModel:
    def test_experts_run_grouped(self, model):
        experts = [m for m in model.modules() if isinstance(m, PLAIN_EXPERTS)]
        assert experts
        assert all(m.config._experts_implementation == IMPLEMENTATION for m in experts)

    def test_targets(self, case, model, folder):
        def targets(spec):
            return resolve_targets(model, folder.family, LoraOptions(spec))

        every = targets("ALL").parameters
        assert len(every) == 4
        assert all(".mlp.experts." in name for name in every)
        assert not any(".gate" in name.removesuffix("gate_proj") for name in targets("ALL").modules)
        assert not targets("qkv").parameters
        assert targets("experts").parameters == every
        assert not targets("experts").modules
        assert len(targets("experts.down_proj").parameters) == 2
        # A last name alone means linear layers: gate_up_proj of experts holds two projections, so
        # that up_proj would be half of it.
        assert not targets("down_proj").parameters
        assert len(targets(r".*layers\.1\.mlp\.experts\..*").parameters) == 2
        leaves = {name.split(".")[-1] for name in targets("qkv").modules}
        latent = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
        assert leaves == ({"q_proj", "k_proj", "v_proj"} if case is VL2_MHA else latent)

    @pytest.mark.parametrize(
        "options",
        [
            LoraOptions("ALL", use_dora=True),
            LoraOptions("ALL", dropout=0.1),
            LoraOptions("experts", init="pissa"),
        ],
    )
    def test_what_lora_on_experts_lacks_is_refused(self, model, folder, options):
        with pytest.raises(ConfigError, match="not supported by LoRA on experts"):
            resolve_targets(model, folder.family, options)

    def test_the_adapters_keys(self, model, folder, tmp_path):
        """Documented in docs/models.md."""
        save_adapter(add_lora(model, folder.family, LoraOptions("experts", rank=4)), tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        text = model.config.text_config
        count, inner, width = text.n_routed_experts, text.moe_intermediate_size, text.hidden_size
        prefix = "base_model.model.model.language_model.layers.1.mlp.experts"
        shapes = {n: tuple(t.shape) for n, t in tensors.items() if n.startswith(prefix)}
        assert shapes == {
            f"{prefix}.lora_A.weight": (4 * count, inner),
            f"{prefix}.lora_B.weight": (width, 4 * count),
            f"{prefix}.base_layer.lora_A.weight": (4 * count, width),
            f"{prefix}.base_layer.lora_B.weight": (2 * inner, 4 * count),
        }

    def test_nf4_covers_the_experts(self, make_model, folder, processor):
        row = {"query": "<image>What is it?", "images": ["images/speck.png"]}
        inputs = processor.collate([processor.encode(row, GOLDEN)])
        del inputs["labels"]
        model = make_model("nf4")
        held = [m for m in model.modules() if isinstance(m, Experts4bit)]
        assert len(held) == 2
        assert all(m.gate_up_proj.dtype == torch.uint8 for m in held)
        with torch.no_grad():
            found = model(**inputs).logits
            rounded = load_model(folder, CPU, trained=replace(CPU, quantize="nf4"))
            assert not any(isinstance(m, Experts4bit) for m in rounded.modules())
            assert_close(found, rounded(**inputs).logits, "logits")
