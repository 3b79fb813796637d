"""Model folders: read tensor by tensor, written in both layouts, refused with reasons."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import (
    GOLDEN,
    JANUS,
    JANUS_PRO,
    SIGLIP,
    TOKENS,
    VL2_MHA,
    VL2_MLA,
    VL2_NOAUX,
    WORDS,
    only_siglip,
    without_ocr2,
)
from safetensors.torch import load_file, save_file
from tolerances import assert_close
from transformers.utils.chat_template_utils import render_jinja_template

from vlft.checkpoints.convert import convert
from vlft.checkpoints.export import export_model
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe, locate_model
from vlft.checkpoints.placement import Placement, resolve_placement
from vlft.checkpoints.quantize import (
    Rounding,
    _quantized_like,
    int8_overflows,
    is_quantized,
    keep_scales,
    quantized_weight,
)
from vlft.checkpoints.weights import read_tensors
from vlft.config import ConvertConfig
from vlft.errors import CheckpointError, ConfigError
from vlft.families import janus

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture
def inputs(processor):
    row = {"query": "<image>What is it?", "images": ["images/chart.png"]}
    batch = processor.collate([processor.encode(row, GOLDEN)])
    del batch["labels"]
    return batch


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def copy(case, tmp_path):
    return shutil.copytree(case.folder, tmp_path / "model")


def load(path):
    return load_model(describe(path), CPU)


def edit_json(path, **fields):
    value = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**value, **fields}))


@pytest.fixture
def both_layouts(folder):
    """Skips families that transformers has no class for."""
    if not folder.family.has_transformers_layout:
        pytest.skip("one layout")


class TestRoundTrip:
    @pytest.mark.parametrize("shard", ["5GB", "200KB"])
    def test_original_to_original_keeps_names_and_bits(self, case, folder, tmp_path, shard):
        model = load_model(folder, CPU, keep_dtypes=True)
        export_model(
            model, folder, tmp_path, layout="original", dtype=None,
            max_shard_size=shard,
        )  # fmt: skip
        before = dict(read_tensors(case.folder))
        after = dict(read_tensors(tmp_path))
        assert before.keys() == after.keys()
        assert all(before[name].dtype == after[name].dtype for name in before)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "200KB")
        for path in case.folder.glob("*config.json"):
            assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text())

    def test_through_transformers_layout_and_back(
        self, both_layouts, case, folder, model, inputs, tmp_path
    ):
        expected, processor = logits(model, inputs), folder.processor()
        previous, layouts = folder, ("transformers", "transformers", "original", "original")
        for number, layout in enumerate(layouts):
            target = tmp_path / str(number)
            target.mkdir()
            current = load_model(previous, CPU)
            export_model(current, previous, target, layout=layout, dtype=None)
            previous = describe(target)
            assert previous.layout == layout
            written = previous.processor()
            assert written.pixels.fingerprint == processor.pixels.fingerprint
            assert written.pixels.tokens == processor.pixels.tokens
            assert written.chat.roles == processor.chat.roles
            assert torch.equal(logits(load(target), inputs), expected)
        before, after = dict(read_tensors(case.folder)), dict(read_tensors(previous.path))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name].float(), after[name].float()) for name in after)

    def test_transformers_itself_loads_what_is_written(
        self, both_layouts, folder, model, inputs, tmp_path
    ):
        export_model(model, folder, tmp_path, layout="transformers", dtype=None)
        cls = folder.family.model_class()
        loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert_close(logits(loaded.eval(), inputs), logits(model, inputs), "logits")

    def test_what_transformers_writes_loads(
        self, both_layouts, folder, model, inputs, case, tmp_path
    ):
        model.save_pretrained(tmp_path)
        for pattern in ("tokenizer*.json", "*processor_config.json"):
            for path in case.folder.glob(pattern):
                shutil.copy(path, tmp_path)
        assert torch.equal(logits(load(tmp_path), inputs), logits(model, inputs))
        assert describe(tmp_path).weights_digest == folder.weights_digest


@only_siglip
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestMapped:
    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_weights_that_need_no_change_stay_in_their_file(self, copy, name):
        if name.endswith(".bin"):
            torch.save(dict(read_tensors(copy)), copy / name)
            (copy / "model.safetensors").unlink()
        model = load_model(describe(copy), CPU, keep_dtypes=True)
        maps = Path("/proc/self/maps").read_text().splitlines()
        lines = [line.split() for line in maps if str(copy / name) in line]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
        head = model.get_output_embeddings().weight
        assert any(first <= head.data_ptr() < end for first, end in ranges)

    def test_training_them_does_not_change_the_file(self, copy):
        before = (copy / "model.safetensors").read_bytes()
        with torch.no_grad():
            for parameter in load_model(describe(copy), CPU, keep_dtypes=True).parameters():
                parameter.add_(1)
        assert (copy / "model.safetensors").read_bytes() == before


@without_ocr2
class TestBinFiles:
    @pytest.mark.parametrize("sharded", [False, True])
    def test_same_as_safetensors(self, copy, model, inputs, sharded):
        weights = dict(read_tensors(copy))
        for path in copy.glob("*.safetensors*"):
            path.unlink()
        if sharded:
            table = {}
            for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
                torch.save({n: weights[n] for n in names}, copy / f"part-{number}.bin")
                table.update(dict.fromkeys(names, f"part-{number}.bin"))
            (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
        else:
            torch.save(weights, copy / "pytorch_model.bin")
        assert torch.equal(logits(load(copy), inputs), logits(model, inputs))

    def test_a_pickle_that_runs_code_is_refused(self, copy, tmp_path):
        trap = tmp_path / "trap"

        class Bomb:
            def __reduce__(self):
                return (open, (str(trap), "w"))

        for path in copy.glob("*.safetensors*"):
            path.unlink()
        torch.save({"a": Bomb()}, copy / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="weights only"):
            load(copy)
        assert not trap.exists()


@only_siglip
class TestRefusals:
    def test_missing_unexpected_and_wrong_tensors_are_named(self, copy):
        path = copy / "model.safetensors"
        weights = load_file(path)
        weights["language_model.model.norm.weight"] = torch.zeros(3)
        del weights["aligner.layers.0.bias"]
        weights["extra.weight"] = torch.zeros(1)
        save_file(weights, path)
        with pytest.raises(CheckpointError) as error:
            load(copy)
        text = str(error.value)
        assert "1 tensors that the model does not have: extra.weight" in text
        assert "1 tensors of the wrong shape or type: model.language_model.norm.weight (3,)" in text
        assert "tensors missing: model.aligner.linear1.bias" in text

    def test_a_damaged_file(self, copy):
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="damaged"):
            load(copy)

    @pytest.mark.parametrize(
        ("config", "found"),
        [
            ({"model_type": "qwen2_vl"}, "found model_type 'qwen2_vl'"),
            ({"a": 1, "b": 2}, "found model_type None and the keys a, b"),
            (
                {
                    "model_type": "deepseek_vl_v2",
                    "architectures": ["SomeOtherModel"],
                    "vision_config": {"model_name": "another_tower"},
                },
                r"'deepseek_vl_v2', architectures \['SomeOtherModel'\]",
            ),
        ],
    )
    def test_other_models(self, tmp_path, config, found):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=found) as error:
            describe(tmp_path)
        assert "supported are: DeepSeek-VL" in str(error.value)

    def test_marks_of_two_families(self, tmp_path):
        tower = {"vision_config": {"cls": "HybridVisionTower"}}
        config = {"model_type": "multi_modality", "gen_head_config": {}, **tower}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"marks of DeepSeek-VL \(SAM .* and Janus"):
            describe(tmp_path)

    def test_no_config(self, tmp_path):
        (tmp_path / "readme.txt").write_text("hi")
        with pytest.raises(CheckpointError, match=r"no config\.json; found readme\.txt"):
            describe(tmp_path)

    def test_no_folder(self):
        with pytest.raises(CheckpointError, match="no such folder, and not a hub id either"):
            locate_model("./not/there")

    def test_aligner_of_another_depth(self, copy):
        config = json.loads((copy / "config.json").read_text())
        config["aligner_config"]["params"]["depth"] = 3
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"of depth 3; .* depth 2 only"):
            describe(copy).processor()

    @pytest.mark.parametrize(
        "name",
        [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "processor_config.json",
            "preprocessor_config.json",
        ],
    )
    @pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"{", b"3"])
    def test_a_damaged_small_file_is_named(self, copy, name, content):
        (copy / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            describe(copy).processor()

    @pytest.mark.parametrize(
        "fields",
        [{"language_config": 3}, {"vision_config": {}}, {"language_config": {"hidden_size": "x"}}],
    )
    def test_a_config_of_another_form(self, copy, fields):
        edit_json(copy / "config.json", **fields)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load(copy)

    def test_an_index_may_not_leave_its_folder(self, copy):
        (copy / "model.safetensors").unlink()
        table = {"weight_map": {"a": "../../etc/passwd"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(table))
        with pytest.raises(CheckpointError, match="outside of the folder"):
            load(copy)

    def test_no_gpu(self, folder):
        with pytest.raises(ConfigError, match="found no usable GPU"):
            resolve_placement(dtype="auto", device="cuda", quantize="none")


@without_ocr2
class TestHostileConfigs:
    @pytest.mark.parametrize(
        "fields",
        [
            {"auto_map": {"AutoModel": "evil.Model"}},
            {"attn_implementation": "someone/kernel"},
            {"_attn_implementation": "someone/kernel"},
            {"quantization_config": {"quant_method": "evil"}},
        ],
    )
    @pytest.mark.parametrize("layout", ["original", "transformers"])
    def test_code_and_kernels_are_never_named(
        self, folder, model, inputs, tmp_path, fields, layout
    ):
        if layout == "transformers" and not folder.family.has_transformers_layout:
            pytest.skip("one layout")
        export_model(model, folder, tmp_path, layout=layout, dtype=None)
        (tmp_path / "evil.py").write_text("raise SystemExit('this ran')")
        config = json.loads((tmp_path / "config.json").read_text())
        inner = "text_config" if layout == "transformers" else "language_config"
        config[inner].update(fields)
        (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
        loaded = load(tmp_path)
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        assert loaded.config._attn_implementation == "sdpa"

    def test_untied_weights_stay_untied(self, both_layouts, folder, model, tmp_path):
        """Without the field the class ties the output layer, silently."""
        export_model(model, folder, tmp_path, layout="transformers", dtype=None)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["tie_word_embeddings"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = load(tmp_path)
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


class TestQuantised:
    @pytest.mark.parametrize("quantize", ["nf4", "int8"])
    def test_only_the_llm_is_quantised(self, make_model, folder, quantize):
        model = make_model(quantize)
        names = [name for name, module in model.named_modules() if is_quantized(module)]
        assert names
        assert all(name.startswith(folder.family.parts.language + ".") for name in names)

    @pytest.mark.parametrize(("quantize", "kind"), [("nf4", "logits"), ("int8", "int8")])
    def test_weights_as_a_run_rounded_them_compute_the_same(
        self, make_model, folder, inputs, quantize, kind
    ):
        """int8 rounds the inputs of a layer too, so that its products are only similar."""
        expected = logits(make_model(quantize), inputs)
        rounded = load_model(folder, CPU, trained=replace(CPU, quantize=quantize))
        assert not any(is_quantized(module) for module in rounded.modules())
        assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
        assert_close(logits(rounded, inputs), expected, kind)
        plain = make_model()
        named = dict(rounded.named_parameters())
        changed = {n for n, p in plain.named_parameters() if not torch.equal(p, named[n])}
        rounding = Rounding.of(plain, folder.family, quantize, torch.float32, CPU.device)
        assert changed == rounding.names

    @pytest.mark.parametrize("times", [1, 15, 80])
    def test_int8_computes_outliers_in_full_precision(self, times):
        """A few large features of many, as large models have them."""
        if int8_overflows():
            pytest.skip("this CPU adds products of 8 bits in 16, which overflow")
        torch.manual_seed(0)
        plain = torch.nn.Linear(1024, 256, bias=False)
        inputs = torch.randn(2, 3, 8, 1024)
        inputs[..., [3, 500, 900]] *= times
        layer = _quantized_like(plain, "int8", torch.float32)
        layer.weight = quantized_weight(layer, plain.weight.data, torch.device("cpu"))
        keep_scales(layer)
        layer.eval()
        with torch.no_grad():
            expected = plain(inputs)
            error = (layer(inputs) - expected).norm() / expected.norm()
        assert error < 0.02

    def test_int8_of_bitsandbytes_still_fails_with_four_axes(self):
        """Once it does not, quantize.FlatLinear8bit can go."""
        layer = bnb.nn.Linear8bitLt(16, 8, has_fp16_weights=False, bias=False)
        layer.weight = quantized_weight(layer, torch.randn(8, 16), torch.device("cpu"))
        layer.eval()
        assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 8)
        with pytest.raises(RuntimeError, match="must match the size"):
            layer(torch.randn(2, 2, 3, 16))

    def test_evaluation_does_not_change_the_weights(self, make_model, inputs):
        model = make_model("nf4")
        first = logits(model, inputs)
        assert torch.equal(logits(model, inputs), first)


@pytest.mark.parametrize("case", [SIGLIP, VL2_MHA], indirect=True, scope="session", ids=str)
def test_grouped_query_attention(copy, processor, inputs):
    """Two heads of keys and values compute what four do of which each two are equal."""
    config = json.loads((copy / "config.json").read_text())
    config["language_config"]["num_key_value_heads"] = 2
    path = copy / "model.safetensors"
    weights = load_file(path)
    few, twice = {}, {}
    for name, weight in weights.items():
        few[name] = twice[name] = weight
        if "k_proj" in name or "v_proj" in name:
            heads = weight.unflatten(0, (4, -1))[:2]
            few[name] = heads.flatten(0, 1).clone()
            twice[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    save_file(twice, path)
    expected = logits(load(copy), inputs)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(few, path)
    assert_close(logits(load(copy), inputs), expected, "logits")


@only_siglip
@pytest.mark.parametrize("pad", [None, "<｜end▁of▁sentence｜>"])
def test_a_tokenizer_without_pad_token_pads_with_eos(copy, pad):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(copy / name, pad_token=pad)
    chat = describe(copy).processor().chat
    assert chat.pad_id == chat.eos_id


@only_siglip
def test_a_tokenizer_without_the_image_tag_gets_it(copy):
    path = copy / "tokenizer.json"
    value = json.loads(path.read_text("utf-8"))
    value["added_tokens"] = [
        token for token in value["added_tokens"] if token["content"] != "<image_placeholder>"
    ]
    value["model"]["vocab"].pop("<image_placeholder>", None)
    path.write_text(json.dumps(value))
    chat = describe(copy).processor().chat
    assert chat.image_token_id == 1503


class TestJanusRoles:
    """Words in Janus-1.3B, tokens in Janus-Pro; the folder says which."""

    @pytest.mark.parametrize(
        ("config", "files", "roles"),
        [
            ({"transformers_version": "4.38.2"}, {}, WORDS),
            ({"transformers_version": "4.38.2"}, {"pytorch_model.bin": ""}, WORDS),
            ({"transformers_version": "4.33.1"}, {}, TOKENS),
            ({"language_config": {}}, {}, TOKENS),
            ({"model_type": "janus"}, {}, TOKENS),
            ({}, {"chat_template.jinja": "<|User|>: <|Assistant|>:"}, TOKENS),
            (
                {"transformers_version": "4.33.1"},
                {"chat_template.json": '{"chat_template": "User: Assistant:"}'},
                WORDS,
            ),
            (
                {},
                {"tokenizer_config.json": '{"chat_template": "<|User|> <|Assistant|>"}'},
                TOKENS,
            ),
            ({}, {}, None),
            ({}, {"pytorch_model.bin": "", "chat_template.jinja": "{{ neither }}"}, None),
            ({"transformers_version": "4.50.0"}, {}, None),
            ({"transformers_version": "4.38.2", "language_config": {}}, {}, None),
        ],
    )
    def test_signs(self, tmp_path, config, files, roles):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        small = {"language_config": {"hidden_size": 64}}
        names, source = janus.roles(tmp_path, {**small, **config})
        assert names == roles
        stated = any("User" in text for text in files.values())
        assert source.startswith("no chat template; ") != stated

    @pytest.mark.parametrize("case", [JANUS_PRO], indirect=True, scope="session", ids=str)
    def test_they_are_asked_and_stated(self, copy, processor, tmp_path, capsys):
        """A Janus-Pro that another tool has saved again looks like Janus-1.3B."""
        weights = dict(read_tensors(copy))
        (copy / "pytorch_model.bin").unlink()
        save_file({k: v.contiguous() for k, v in weights.items()}, copy / "model.safetensors")
        edit_json(copy / "config.json", transformers_version="4.51.3")
        with pytest.raises(CheckpointError, match="not known: no chat template; no sign") as error:
            locate_model(str(copy)).processor()
        assert "--model-roles words" in str(error.value)
        for kind, roles in (("tokens", TOKENS), ("words", WORDS)):
            convert(ConvertConfig(src=str(copy), dst=tmp_path / kind, model_roles=kind))
            assert locate_model(str(tmp_path / kind)).processor().chat.roles == roles
        assert "roles:" not in capsys.readouterr().err
        row = {"query": "<image>What is it?", "images": ["images/chart.png"]}
        stated = locate_model(str(tmp_path / "tokens")).processor()
        assert torch.equal(
            stated.encode(row, GOLDEN).input_ids, processor.encode(row, GOLDEN).input_ids
        )

    @pytest.mark.parametrize("case", [JANUS], indirect=True, scope="session", ids=str)
    def test_signs_are_said_in_a_line(self, copy, capsys):
        locate_model(str(copy))
        line = "roles: User, Assistant (no chat template; transformers_version 4.38.2)"
        assert line in capsys.readouterr().err

    @only_siglip
    def test_other_families_have_one_pair(self, copy, tmp_path):
        with pytest.raises(ConfigError, match="has one pair of roles"):
            convert(ConvertConfig(src=str(copy), dst=tmp_path / "new", model_roles="words"))

    @pytest.mark.parametrize("case", [JANUS_PRO], indirect=True, scope="session", ids=str)
    @pytest.mark.parametrize("version", ["4.33.1", "4.38.2"])
    def test_they_are_kept_in_whatever_is_written(self, case, copy, tmp_path, version):
        """Whether the base's config.json says the roles, or the user."""
        edit_json(copy / "config.json", transformers_version=version)
        base = replace(describe(copy), roles=None if version == "4.33.1" else TOKENS)
        assert base.processor().chat.roles == TOKENS
        model = load_model(base, CPU)
        for number, layout in enumerate(("original", "transformers", "original")):
            target = tmp_path / str(number)
            target.mkdir()
            export_model(model, base, target, layout=layout, dtype=None)
            base = describe(target)
            assert base.processor().chat.roles == TOKENS
        template = target / "chat_template.jinja"
        if template.exists():
            parts = [{"type": "image"}, {"type": "text", "text": "Hi."}]
            messages = [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "More."},
            ]
            systems = (None, "Be brief.", "")
            rows = [messages, *([{"role": "system", "content": s}, *messages] for s in systems[1:])]
            texts, _ = render_jinja_template(
                rows,
                chat_template=template.read_text("utf-8"),
                add_generation_prompt=True,
                eos_token=base.processor().chat.eos_token,
            )
            row = {"query": "More.", "history": [["<image>Hi.", "Yes."]], "images": ["chart.png"]}
            for text, system in zip(texts, systems, strict=True):
                sample = base.processor().encode({**row, "system": system}, GOLDEN / "images")
                assert text == sample.text


class TestMixtures:
    @pytest.mark.parametrize("case", [VL2_MLA], indirect=True, scope="session", ids=str)
    def test_a_missing_expert_is_named(self, copy):
        for path in copy.glob("*.safetensors"):
            weights = load_file(path)
            weights.pop("language.model.layers.1.mlp.experts.3.up_proj.weight", None)
            save_file(weights, path)
        with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight is not in model-"):
            load(copy)
        index = copy / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        names.pop("language.model.layers.1.mlp.experts.3.up_proj.weight")
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(CheckpointError, match=r"missing: .*layers\.1\.mlp\.experts\.gate_up"):
            load(copy)

    @pytest.mark.parametrize("case", [VL2_MLA], indirect=True, scope="session", ids=str)
    def test_an_expert_too_many_is_named(self, copy):
        path = next(iter(sorted(copy.glob("*.safetensors"))))
        weights = load_file(path)
        weights["language.model.layers.1.mlp.experts.8.up_proj.weight"] = torch.zeros(32, 64)
        save_file(weights, path)
        index = copy / "model.safetensors.index.json"
        table = json.loads(index.read_text())
        table["weight_map"]["language.model.layers.1.mlp.experts.8.up_proj.weight"] = path.name
        index.write_text(json.dumps(table))
        with pytest.raises(CheckpointError, match=r"does not have: .*experts\.8\.up_proj"):
            load(copy)

    @pytest.mark.parametrize("case", [VL2_NOAUX], indirect=True, scope="session", ids=str)
    def test_the_correction_bias_keeps_its_dtype(self, case, folder, tmp_path):
        """It is added to scores of which small differences choose."""
        half = Placement(torch.device("cpu"), torch.bfloat16)
        model = load_model(folder, half)
        gate = model.model.language_model.layers[1].mlp.gate
        assert gate.weight.dtype == torch.bfloat16
        assert gate.e_score_correction_bias.dtype == torch.float32
        export_model(model, folder, tmp_path, layout="original", dtype=torch.bfloat16)
        written, before = dict(read_tensors(tmp_path)), dict(read_tensors(case.folder))
        name = "language.model.layers.1.mlp.gate.e_score_correction_bias"
        assert torch.equal(written[name], before[name])
        assert written["image_newline"].dtype == torch.bfloat16

    @pytest.mark.parametrize("case", [VL2_MHA], indirect=True, scope="session", ids=str)
    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ({"language_config": {"topk_method": "gready"}}, "topk_method 'gready'"),
            ({"language_config": {"scoring_func": "relu"}}, "scoring_func 'relu'"),
            ({"projector_config": {"projector_type": "linear"}}, "projector_type 'linear'"),
            ({"tile_tag": "1D"}, "tile_tag '1D'"),
        ],
    )
    def test_what_the_model_cannot_be_is_refused(self, copy, fields, found):
        config = json.loads((copy / "config.json").read_text())
        for name, value in fields.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=found) as error:
            describe(copy).processor()
        assert "config.json" in str(error.value)
        assert "allowed: " in str(error.value)


@pytest.mark.parametrize("case", [JANUS], indirect=True, scope="session", ids=str)
def test_a_deeper_aligner(copy, processor, inputs):
    """transformers' Janus takes any depth. The third layer is the identity after a GELU."""
    config = json.loads((copy / "config.json").read_text())
    config["aligner_config"]["params"]["depth"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    weights = dict(read_tensors(copy))
    weights["aligner.layers.4.weight"] = torch.eye(64, dtype=torch.bfloat16)
    weights["aligner.layers.4.bias"] = torch.zeros(64, dtype=torch.bfloat16)
    save_file(weights, copy / "model.safetensors")
    model = load(copy)
    pixels = inputs["pixel_values"]
    with torch.no_grad():
        aligner = model.model.aligner
        hidden = model.model.vision_model(pixels).last_hidden_state
        plain = aligner.hidden_layers[0](torch.nn.functional.gelu(aligner.fc1(hidden)))
        expected = torch.nn.functional.gelu(plain)
        assert_close(aligner(hidden), expected, "layer")
