"""Only the targets train, and plain peft loads the adapters."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import OCR, OCR2, ONE_EACH, SIGLIP, VL2_NOAUX, logits, only_siglip
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tolerances import assert_close
from torch import nn

from vlft.checkpoints.adapter import load_adapter, save_adapter
from vlft.checkpoints.export import export_model
from vlft.config import NEEDS_WHOLE_WEIGHTS
from vlft.errors import CheckpointError, ConfigError
from vlft.families.base import is_in
from vlft.training.lora import (
    LoraOptions,
    add_lora,
    extra_parts,
    resolve_targets,
    targets_pattern,
    train_fully,
)

OPTIONS = {
    "qkv": LoraOptions(),
    "ALL": LoraOptions("ALL", rank=4),
    "parts": LoraOptions("ALL", train_aligner=True, train_vision=True),
    "dora": LoraOptions("q_proj,o_proj", use_dora=True),
    "rslora": LoraOptions(use_rslora=True),
    "gaussian": LoraOptions(init="gaussian"),
    "orthogonal": LoraOptions(init="orthogonal"),
    "olora": LoraOptions(init="olora"),
    "pissa": LoraOptions(init="pissa"),
}
# Every option is tested on one checkpoint, the usual ones on all families but the slowest.
USUAL = ("qkv", "ALL", "parts")
ways = pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case in ONE_EACH
        for name in OPTIONS
        if case is SIGLIP or (name == "parts" if case is OCR2 else name in USUAL)
    ],
    indirect=["case"],
    ids=str,
)


def shake(model):
    """Moves every adapter weight, so that the adapter does something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


class TestTargets:
    def leaves(self, model, folder, **options):
        names = resolve_targets(model, folder.family, LoraOptions(**options)).modules
        return {name.split(".")[-1] for name in names}, names

    def test_qkv_is_the_llms_attention_inputs(self, case, model, folder):
        leaves, names = self.leaves(model, folder)
        latent = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
        assert leaves == (latent if case is VL2_NOAUX else {"q_proj", "k_proj", "v_proj"})
        assert all(name.startswith(folder.family.parts.language + ".") for name in names)

    def test_all_is_every_linear_of_the_llm_and_not_the_head(self, model, folder):
        _, names = self.leaves(model, folder, target_modules="ALL")
        language = model.get_submodule(folder.family.parts.language)
        count = sum(isinstance(module, nn.Linear) for module in language.modules())
        assert len(names) == count
        assert folder.family.parts.head not in names

    def test_names_are_anchored_to_the_llm(self, model, folder):
        leaf = folder.family.attention_inputs[0]
        _, names = self.leaves(model, folder, target_modules=leaf)
        assert names
        assert all(name.startswith(folder.family.parts.language + ".") for name in names)

    def test_a_longer_name_is_one_layer(self, model, folder):
        leaf = folder.family.attention_inputs[0]
        _, names = self.leaves(model, folder, target_modules=f"layers.1.self_attn.{leaf}")
        assert len(names) == 1

    def test_a_regular_expression_is_anchored_too(self, model, folder):
        _, names = self.leaves(model, folder, target_modules=r".*q_proj|.*out_proj")
        assert names
        assert all(name.startswith(folder.family.parts.language + ".") for name in names)

    @pytest.mark.parametrize("spec", ["no_such_proj", "q_proj,no_such_proj", ".*nothing$"])
    def test_what_matches_nothing_is_an_error_that_lists_what_exists(self, model, folder, spec):
        with pytest.raises(ConfigError, match=r"matches no linear layer.*\n.*there are .*o_proj"):
            resolve_targets(model, folder.family, LoraOptions(spec))

    def test_what_is_no_expression_is_an_error(self, model, folder):
        with pytest.raises(ConfigError, match="not a regular expression"):
            resolve_targets(model, folder.family, LoraOptions("(q_proj"))

    @pytest.mark.parametrize("name", ["qkv", "ALL", "parts"])
    def test_the_pattern_matches_the_targets_and_nothing_else(self, model, folder, name):
        names = resolve_targets(model, folder.family, OPTIONS[name]).modules
        pattern = re.compile(targets_pattern(names))
        every = [module_name for module_name, _ in model.named_modules()]
        assert {n for n in every if pattern.fullmatch(n)} == set(names)


@ways
def test_only_adapters_train_and_only_on_targets(model, folder, name):
    targets = resolve_targets(model, folder.family, OPTIONS[name])
    add_lora(model, folder.family, OPTIONS[name])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(".lora_" in n for n in trained)
    experts = {n.rpartition(".")[0] for n in targets.parameters}
    found = {n.split(".lora_")[0].removesuffix(".base_layer") for n in trained}
    assert found == set(targets.modules) | experts
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@ways
def test_starts_as_the_base(model, folder, inputs, name):
    before = logits(model, inputs)
    add_lora(model, folder.family, OPTIONS[name])
    kind = "split base" if OPTIONS[name].init in ("orthogonal", "olora", "pissa") else "logits"
    assert_close(logits(model, inputs), before, kind)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@ways
def test_save_and_load(make_model, folder, inputs, tmp_path, name, quantize):
    if quantize != "none" and OPTIONS[name].init in NEEDS_WHOLE_WEIGHTS:
        pytest.skip("refused with --quantize")
    model = make_model(quantize)
    tuned = add_lora(model, folder.family, OPTIONS[name])
    shake(model)
    expected = logits(model, inputs)
    save_adapter(tuned, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = load_adapter(make_model(quantize), tmp_path)
    state = tuned.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items() if "lora_" in n)
    # Not bit by bit: the order of a sum depends on where in memory its numbers lie.
    kind = "int8" if quantize == "int8" else "logits"
    assert_close(logits(again, inputs), expected, kind)
    assert not any(p.requires_grad for p in again.parameters())


@only_siglip
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dora_trains_on_quantised_weights(make_model, folder, inputs, quantize):
    """peft's start of DoRA copies them to the CPU."""
    model = make_model(quantize)
    tuned = add_lora(model, folder.family, OPTIONS["dora"])
    logits = tuned(**inputs).logits
    logits.float().square().mean().backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@only_siglip
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["olora", "pissa", "orthogonal"])
def test_starts_that_change_the_base_are_refused_on_quantised_weights(
    make_model, folder, inputs, tmp_path, name, quantize
):
    model = make_model()
    tuned = add_lora(model, folder.family, OPTIONS[name])
    shake(model)
    expected = logits(model, inputs)
    save_adapter(tuned, tmp_path)
    if name == "orthogonal":
        # It only needs its own matrices; what differs is the quantised base.
        found = logits(load_adapter(make_model(quantize), tmp_path), inputs)
        assert (found - expected).norm() / expected.norm() < 0.5
        return
    with pytest.raises(
        ConfigError, match=rf"--quantize: the adapter started with {name}(.|\n)*merge"
    ):
        load_adapter(make_model(quantize), tmp_path)


def as_plain_class(make_model, folder, target):
    """A base that vlft has not touched; where transformers has no class, vlft's own."""
    if not folder.family.has_transformers_layout:
        return make_model()
    target.mkdir()
    export_model(make_model(), folder, target, layout="transformers", dtype=None)
    return folder.family.model_class().from_pretrained(target)


@ways
def test_plain_peft_loads_it_onto_the_plain_class(
    case, model, make_model, folder, processor, inputs, tmp_path, name
):
    if case in (OCR, OCR2):
        pytest.skip("see test_peft_still_loses_weights_of_deepseek_ocr")
    from peft import PeftModel

    plain_model = as_plain_class(make_model, folder, tmp_path / "native")
    tuned = add_lora(model, folder.family, OPTIONS[name])
    shake(model)
    expected = logits(model, inputs)
    save_adapter(tuned, tmp_path)
    plain = PeftModel.from_pretrained(plain_model, tmp_path)
    assert_close(logits(plain, inputs), expected, "logits")


@pytest.mark.parametrize(("aligner", "vision"), [(False, False), (True, False), (True, True)])
def test_a_full_run_trains_the_asked_parts(model, folder, aligner, vision):
    asked = {"aligner": aligner, "vision": vision, "gen_aligner": False, "gen_head": False}
    train_fully(model, folder.family, extra_parts(folder.family, **asked))
    parts = folder.family.parts
    for name, parameter in model.named_parameters():
        frozen = (
            (is_in(name, parts.aligner) and not aligner)
            or (is_in(name, parts.vision) and not vision)
            or is_in(name, parts.other)
            or name.endswith("e_score_correction_bias")
        )
        assert parameter.requires_grad != frozen, name


@only_siglip
class TestHostileAdapters:
    """Nothing in an adapter folder is run, imported or unpickled."""

    @pytest.fixture
    def adapter(self, model, folder, tmp_path):
        save_adapter(add_lora(model, folder.family, LoraOptions()), tmp_path)
        return tmp_path

    def edit(self, adapter, **fields):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    @pytest.mark.parametrize(
        "fields",
        [
            {"megatron_core": "os"},
            {"megatron_config": {"a": 1}},
            {"eva_config": {"rho": 2.0}},
            {"modules_to_save": ["lm_head"]},
            {"made_up": "value"},
        ],
    )
    def test_other_fields_are_refused(self, make_model, adapter, fields):
        self.edit(adapter, **fields)
        with pytest.raises(CheckpointError, match=next(iter(fields))):
            load_adapter(make_model(), adapter)

    def test_other_methods_are_refused(self, make_model, adapter):
        self.edit(adapter, peft_type="LOHA")
        with pytest.raises(CheckpointError, match="found peft_type 'LOHA', 'LORA' is allowed"):
            load_adapter(make_model(), adapter)

    def test_pickled_weights_are_not_read(self, make_model, adapter):
        weights = load_file(adapter / "adapter_model.safetensors")
        (adapter / "adapter_model.safetensors").unlink()
        torch.save(weights, adapter / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="only safetensors adapters are read"):
            load_adapter(make_model(), adapter)

    def test_missing_weights_are_named(self, make_model, adapter):
        path = adapter / "adapter_model.safetensors"
        weights = load_file(path)
        name = sorted(weights)[0]
        del weights[name]
        save_file(weights, path)
        with pytest.raises(CheckpointError, match=re.escape(name.split(".lora_")[0])):
            load_adapter(make_model(), adapter)


@only_siglip
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "eva"}, "found init_lora_weights 'eva'"),
        ({"init_lora_weights": "pissa_niter_4"}, "found init_lora_weights 'pissa_niter_4'"),
        ({"layers_pattern": "x"}, "cannot be used"),
    ],
)
def test_values_that_cannot_be_used_are_refused(
    model, folder, make_model, tmp_path, fields, message
):
    save_adapter(add_lora(model, folder.family, LoraOptions()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError, match=message):
        load_adapter(make_model(), tmp_path)


@only_siglip
def test_a_damaged_adapter_and_a_wrong_base_are_named(model, folder, make_model, tmp_path):
    save_adapter(add_lora(model, folder.family, LoraOptions()), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor[:, :3].clone() for name, tensor in weights.items()}, path)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_adapter(make_model(), tmp_path)
    path.write_bytes(b"half")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_adapter(make_model(), tmp_path)


@pytest.mark.parametrize("case", [OCR, OCR2], indirect=True, ids=str)
def test_peft_still_loses_weights_of_deepseek_ocr(make_model, folder):
    """If this fails, adapter._load can be peft's set_peft_model_state_dict again."""
    tuned = add_lora(make_model(), folder.family, LoraOptions())
    shake(tuned)
    state = {name: tensor + 1 for name, tensor in get_peft_model_state_dict(tuned).items()}
    set_peft_model_state_dict(tuned, state)
    found = get_peft_model_state_dict(tuned)
    assert not any(torch.equal(found[name], tensor) for name, tensor in state.items())
