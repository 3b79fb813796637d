"""Adapters of plain peft and of other tools: read as what they are, or refused by name."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch
from conftest import (
    FULLRES,
    GOLDEN,
    MATRIX,
    OCR2,
    ONE_EACH,
    VL2_NOAUX,
    logits,
    make_rows,
    only_siglip,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from tolerances import assert_close

import vlft
from vlft.checkpoints.adapter import load_adapter, save_adapter
from vlft.checkpoints.export import export_model, nested_name
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.weights import read_tensors
from vlft.errors import CheckpointError, ConfigError, UsageError
from vlft.training.lora import LoraOptions, add_lora

CPU = Placement(torch.device("cpu"), torch.float32)
PREFIX = "base_model.model."


def write_adapter(path, tensors, **config):
    """An adapter as other tools write it; returns its folder."""
    path.mkdir(exist_ok=True)
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "lora_dropout": 0.05, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(stated | config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def edit(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(adapter, change):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


# What is tuned, as other tools write it for the authors' class: names, or an expression for all.
TARGETS = {
    "names": r"self_attn\.(q_proj|kv_b_proj|o_proj)",
    "vision": r"(blocks|vision_model|sam_model).*\.(qkv|proj|fc1|lin1)",
    "aligner": r"(aligner|projector)\..*",
    "experts": r"mlp\.experts\.\d+\.(gate|up|down)_proj",
    "some experts": r"mlp\.experts\.[123]\.up_proj",
}


# FULLRES is left out: it differs from HYBRID in the size of images, and names are tested here.
@pytest.mark.parametrize(
    "case", [c for c in MATRIX if c is not FULLRES], indirect=True, ids=str, scope="session"
)
@pytest.mark.parametrize("what", TARGETS)
def test_on_the_authors_class(case, folder, inputs, tmp_path, what):
    """The reference is the authors' own weights plus the product of B and A."""
    rslora = what in ("aligner", "some experts")
    torch.manual_seed(0)
    base = dict(read_tensors(case.folder))
    keys = folder.family.keys
    pattern = re.compile(rf".*{TARGETS[what]}\.weight")
    chosen = [n for n, w in base.items() if w.ndim == 2 and pattern.fullmatch(n)]
    chosen = [n for n in chosen if not keys.is_unused(n) and not n.startswith("gen_")]
    if not chosen:
        pytest.skip("no such layers")
    modules = [name.removesuffix(".weight") for name in chosen]
    odd, tensors = modules[-1], {}
    stacked = keys.from_original(chosen[0]).change == "stack"
    for name, module in zip(chosen, modules, strict=True):
        rank, alpha = (4, 5) if module == odd and not stacked else (2, 3)
        a, b = torch.randn(rank, base[name].shape[1]), torch.randn(len(base[name]), rank)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b / 20}
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        base[name] = base[name].float() + scale * (b / 20) @ a
    patterns = {} if stacked else {"rank_pattern": {odd: 4}, "alpha_pattern": {odd: 5}}
    target = rf"^({'|'.join(map(re.escape, modules))})$"
    adapter = write_adapter(
        tmp_path / "a", tensors, target_modules=target, use_rslora=rslora, **patterns
    )
    reference = tmp_path / "reference"
    reference.mkdir()
    for path in case.folder.glob("*.json"):
        if "index" not in path.name:
            (reference / path.name).write_bytes(path.read_bytes())
    save_file(base, reference / "model.safetensors")
    found = logits(load_adapter(load_model(folder, CPU), adapter), inputs)
    assert_close(found, logits(load_model(describe(reference), CPU), inputs), "merged logits")
    assert (found - logits(load_model(folder, CPU), inputs)).abs().max() > 1e-2


@pytest.fixture
def plain(folder, tmp_path):
    """A function that trains an adapter with peft alone, on transformers' own class."""
    from peft import LoraConfig, get_peft_model

    def make(**config):
        native = tmp_path / "native"
        native.mkdir()
        export_model(load_model(folder, CPU), folder, native, layout="transformers", dtype=None)
        model = folder.family.model_class().from_pretrained(native, dtype=torch.float32)
        torch.manual_seed(1)
        peft_model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **config))
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        peft_model.save_pretrained(tmp_path / "plain")
        return peft_model, tmp_path / "plain", native

    return make


NATIVE = [case for case in ONE_EACH if case not in (VL2_NOAUX, OCR2)]
PLAIN = {
    "without task": {"target_modules": ["q_proj", "v_proj"]},
    "with task": {"target_modules": ["o_proj"], "task_type": "CAUSAL_LM"},
    "layers": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*lm_head|.*generation.*"},
    "head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "aligner": {"target_modules": ["v_proj"], "modules_to_save": ["the aligner"]},
    "linear": {"target_modules": r".*q_proj|.*linear\d", "modules_to_save": ["linear1", "fc1"]},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "biases": {"target_modules": ["v_proj"], "bias": "all"},
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("case", NATIVE, indirect=True, ids=str, scope="session")
def test_of_plain_peft(case, folder, inputs, plain, name, capfd):
    if name == "linear" and case.family != "deepseek_vl":
        pytest.skip("other names")
    config = PLAIN[name]
    if name == "aligner":
        config = {**config, "modules_to_save": [folder.family.parts.aligner[0].split(".")[-1]]}
    peft_model, adapter, native = plain(**config)
    expected = logits(peft_model, inputs)
    for base in (folder, describe(native)):
        capfd.readouterr()
        found = logits(load_adapter(load_model(base, CPU), adapter), inputs)
        assert_close(found, expected, "logits")
        # What was trained fully is said aloud.
        said = "trained fully" in capfd.readouterr().err
        assert said == (name in ("head", "aligner", "linear", "biases") or "bias" in name)


@only_siglip
def test_the_names_of_other_releases(folder, model, make_model, inputs, tmp_path):
    """The tower is nested more deeply in some releases of transformers."""
    tuned = add_lora(model, folder.family, LoraOptions("ALL", train_vision=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    expected = logits(model, inputs)
    save_adapter(tuned, tmp_path)
    edit(tmp_path, target_modules=["q_proj", "fc1"])
    edit_weights(
        tmp_path,
        lambda w: [
            w.__setitem__(PREFIX + nested_name(n.removeprefix(PREFIX)), w.pop(n)) for n in list(w)
        ],
    )
    with pytest.raises(CheckpointError, match=r"does not call for"):
        load_adapter(make_model(), tmp_path)
    edit(
        tmp_path,
        target_modules=r"model\.(language_model|vision_model\.vision_model)\..*(proj|fc\d)",
    )
    assert_close(logits(load_adapter(make_model(), tmp_path), inputs), expected, "logits")


@only_siglip
class TestRefused:
    @pytest.fixture
    def adapter(self, model, folder, tmp_path):
        save_adapter(add_lora(model, folder.family, LoraOptions()), tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        "name",
        [
            "lm_head.weight",
            "lm_head.lora_A.weight",
            "model.language_model.norm.weight",
            "model.language_model.embed_tokens.weight",
            "model.language_model.layers.0.self_attn.q_proj.weight",
            "model.language_model.layers.0.self_attn.q_proj.base_layer.weight",
            "model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "model.language_model.layers.0.mlp.up_proj.lora_A.weight",
            "model.language_model.layers.0.self_attn.q_proj.lora_B.bias",
            "model.vision_model.post_layernorm.bias",
            "made.up",
        ],
    )
    @pytest.mark.parametrize("prefix", [PREFIX, ""])
    def test_tensors_that_the_configuration_does_not_call_for(
        self, make_model, adapter, name, prefix
    ):
        edit_weights(adapter, lambda weights: weights.update({prefix + name: torch.ones(3)}))
        model = make_model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=re.escape(name.split(".lora_")[0])) as error:
            load_adapter(model, adapter)
        assert "adapter_model.safetensors" in error.value.place
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before if key in after)

    def test_what_the_head_alone_calls_for_is_no_licence_for_the_rest(self, make_model, adapter):
        edit(adapter, modules_to_save=["lm_head"])
        head = make_model().lm_head.weight.data
        edit_weights(adapter, lambda w: w.update({f"{PREFIX}lm_head.weight": head + 1}))
        assert torch.equal(
            load_adapter(make_model(), adapter).base_model.model.lm_head.weight, head + 1
        )
        name = f"{PREFIX}model.language_model.norm.weight"
        edit_weights(adapter, lambda w: w.update({name: head}))
        with pytest.raises(CheckpointError, match=r"norm.weight, which its adapter_config.json"):
            load_adapter(make_model(), adapter)

    @pytest.mark.parametrize("saved", [["aligner"], ["no_such_part"], ["lm_head", "aligner"]])
    def test_full_parts_that_are_not_there(self, make_model, adapter, saved):
        edit(adapter, modules_to_save=saved)
        with pytest.raises(CheckpointError, match=r"lacks .* modules_to_save"):
            load_adapter(make_model(), adapter)

    def test_full_parts_do_not_train_and_are_not_quantised(self, make_model, adapter):
        leaf = "model.language_model.layers.0.mlp.up_proj"
        edit(adapter, modules_to_save=["layers.0.mlp.up_proj"])
        weight = make_model().get_submodule(leaf).weight.data
        edit_weights(adapter, lambda w: w.update({f"{PREFIX}{leaf}.weight": weight}))
        load_adapter(make_model(), adapter)
        for quantize, trainable in (("nf4", False), ("none", True)):
            with pytest.raises(CheckpointError, match=r"replaces .*up_proj(.|\n)*merge it first"):
                load_adapter(make_model(quantize), adapter, trainable=trainable)

    def test_auto_mapping_is_inert(self, make_model, adapter):
        edit(adapter, auto_mapping={"base_model_class": "system", "parent_library": "os"})
        config = load_adapter(make_model(), adapter).peft_config["default"]
        assert config.auto_mapping is None

    def test_another_model(self, make_model, adapter):
        edit_weights(
            adapter,
            lambda w: [
                w.__setitem__(n.replace("layers.0", "layers.99"), w.pop(n)) for n in list(w)
            ],
        )
        with pytest.raises(CheckpointError, match=r"is for model.*layers\.99.*does not have"):
            load_adapter(make_model(), adapter)


@pytest.fixture(scope="module")
def run(case, tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    row = {"query": "<image>What?", "response": "A.", "images": ["photo_a.jpg"]}
    (home / "t.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"query": "b"}))
    return vlft.sft(
        vlft.SftConfig(
            model=str(case.folder), dataset=(str(home / "t.jsonl"),), max_steps=1,
            image_root=GOLDEN / "images", val_ratio=0.5, output_dir=home, show_sample=False,
        )
    )  # fmt: skip


@only_siglip
class TestFolders:
    def infer(self, folder, tmp_path, **settings):
        return vlft.infer(
            vlft.InferConfig(
                ckpt_dir=folder, output=tmp_path / "out.jsonl", max_new_tokens=2, show_samples=0,
                **settings,
            )
        )  # fmt: skip

    @pytest.mark.parametrize("kept", [True, False])
    def test_under_another_name(self, run, tmp_path, kept):
        """Its files say what a folder is; without the settings of its run it is an adapter."""
        moved = tmp_path / "my best"
        moved.mkdir()
        for path in run.checkpoint.iterdir():
            if path.is_file() and (kept or path.name != "run_config.json"):
                (moved / path.name).write_bytes(path.read_bytes())
        data = run.run.parent.parent / "t.jsonl"
        result = self.infer(moved, tmp_path, dataset=(str(data),), image_root=GOLDEN / "images")
        assert len(result.rows) == 2
        merged = vlft.merge_lora(vlft.MergeLoraConfig(ckpt_dir=moved, output_dir=tmp_path / "m"))
        assert merged.difference < 1e-4
        with pytest.raises(ConfigError, match=r"--load-dataset-config: .*is not in its run"):
            self.infer(moved, tmp_path, load_dataset_config=True)
        with pytest.raises(CheckpointError, match="in its run and under this name"):
            vlft.sft(vlft.SftConfig(resume=moved))

    def test_an_adapter_without_a_base(self, run, case, tmp_path):
        adapter = write_adapter(
            tmp_path / "a", load_file(run.checkpoint / "adapter_model.safetensors"), r=8,
            target_modules=["q_proj", "k_proj", "v_proj"],
            exclude_modules=r".*vision_model.*",
        )  # fmt: skip
        (tmp_path / "q.jsonl").write_text('{"query": "Hello."}\n')
        data = (str(tmp_path / "q.jsonl"),)
        with pytest.raises(ConfigError, match=r"--model: .*a does not name its base"):
            self.infer(adapter, tmp_path, dataset=data)
        assert self.infer(adapter, tmp_path, dataset=data, model=str(case.folder)).rows


class TestStartingFromOne:
    """``vlft sft --adapter``: its weights and its layers, on new data."""

    def config(self, tmp_path, **settings):
        rows = make_rows(8)
        data = write_jsonl(tmp_path / "new.jsonl", rows[:6])
        val = write_jsonl(tmp_path / "val.jsonl", rows[6:])
        return vlft.SftConfig(
            dataset=(str(data),), val_dataset=(str(val),), image_root=GOLDEN / "images",
            output_dir=tmp_path / "out", batch_size=2, save_steps=1,
            show_sample=False,
            **{"max_steps": 2, "learning_rate": 1e-2, **settings},
        )  # fmt: skip

    def losses(self, run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [row.get("loss", row.get("val_loss")) for row in map(json.loads, lines)]

    @only_siglip
    def test_of_a_run(self, case, tmp_path):
        """It goes on where the first run ended, and can be resumed without it."""
        own = {"lora_rank": 4, "lora_target_modules": "o_proj", "train_aligner": True}
        first = vlft.sft(self.config(tmp_path, model=str(case.folder), **own)).run
        second = vlft.sft(self.config(tmp_path, adapter=first)).run
        assert_close(self.losses(second)[0], self.losses(first)[-1], "loss")
        configs = [
            json.loads((run / "last" / "adapter_config.json").read_text())
            for run in (first, second)
        ]
        assert configs[0] == configs[1]
        assert json.loads((second / "provenance.json").read_text())["adapter"]
        # The aligner trains, so that features of before it are cached.
        live = vlft.sft(self.config(tmp_path, adapter=first, vision_cache="off")).run
        assert_close(self.losses(live), self.losses(second), "run losses")
        expected = load_file(second / "last" / "adapter_model.safetensors")
        shutil.rmtree(first)
        again = vlft.sft(vlft.SftConfig(resume=second / "checkpoint-1", overwrite=True)).run
        found = load_file(again / "last" / "adapter_model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("case", [VL2_NOAUX], indirect=True, ids=str, scope="session")
    def test_of_others(self, case, folder, inputs, tmp_path):
        """What is read from the authors' names is trained, and saved under the model's."""
        torch.manual_seed(0)
        base, tensors = dict(read_tensors(case.folder)), {}
        for name, weight in base.items():
            if re.fullmatch(r"language.*(q_proj|mlp\.experts\.\d+\.up_proj)\.weight", name):
                module = f"{PREFIX}{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1]) / 9
                tensors[f"{module}.lora_B.weight"] = torch.randn(len(weight), 2) / 9
        theirs = {"target_modules": ["q_proj", "up_proj"], "lora_dropout": 0}
        edits = {"exclude_modules": r".*(shared_experts|layers\.0\.mlp).*"}
        adapter = write_adapter(tmp_path / "a", tensors, **theirs, **edits)
        run = vlft.sft(self.config(tmp_path, model=str(case.folder), adapter=adapter)).run
        before, after = (
            logits(load_adapter(load_model(folder, CPU), path), inputs)
            for path in (adapter, run / "last")
        )
        assert not torch.equal(before, after)
        assert len(load_file(run / "last" / "adapter_model.safetensors")) < len(tensors)

    @only_siglip
    @pytest.mark.parametrize("kind", ["use_dora", "use_rslora"])
    def test_of_plain_peft(self, case, inputs, folder, plain, tmp_path, kind):
        """Kind, ranks and scales are those of the adapter, and the run begins with its weights."""
        patterns = {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}
        targets = ["q_proj", "v_proj"]
        peft_model, adapter, _ = plain(target_modules=targets, **patterns, **{kind: True})
        still = {"model": str(case.folder), "learning_rate": 1e-12, "max_steps": 1}
        run = vlft.sft(self.config(tmp_path, adapter=adapter, **still)).run
        saved = json.loads((run / "last" / "adapter_config.json").read_text())
        assert (saved[kind], saved["r"]) == (True, 2)
        tensors = load_file(run / "last" / "adapter_model.safetensors")
        ranks = {name.split(".")[-3]: len(t) for name, t in tensors.items() if "lora_A" in name}
        assert ranks == {"q_proj": 2, "v_proj": 3}
        found = logits(load_adapter(load_model(folder, CPU), run / "last"), inputs)
        assert_close(found, logits(peft_model, inputs), "logits")

    @only_siglip
    @pytest.mark.parametrize(
        ("settings", "found"),
        [
            ({"lora_rank": 4, "train_aligner": True}, "--lora-rank, --train-aligner: the adapter"),
            ({"tuner": "full"}, "--adapter: only with --tuner lora"),
            ({"adapter": "nothing"}, "nothing: no such folder"),
        ],
    )
    def test_what_does_not_go_with_it(self, run, tmp_path, settings, found):
        with pytest.raises(UsageError, match=re.escape(found)):
            vlft.sft(self.config(tmp_path, **{"adapter": run.checkpoint, **settings}))

    @only_siglip
    def test_another_base(self, run, case, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(case.folder, other)
        weights = load_file(other / "model.safetensors")
        weights["language_model.lm_head.weight"] += 1
        save_file(weights, other / "model.safetensors")
        with pytest.raises(CheckpointError, match="not those that the adapter was trained on"):
            vlft.sft(self.config(tmp_path, adapter=run.checkpoint, model=str(other)))
        accepted = {"model": str(other), "accept_changes": True}
        assert vlft.sft(self.config(tmp_path, adapter=run.checkpoint, **accepted)).finished
