"""Numbers that are none, keys that stand twice, code that a model's files name: all are said."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest
import torch
from conftest import GOLDEN, SIGLIP
from safetensors.torch import load_file, save_file

import vlft
from vlft.checkpoints.convert import convert
from vlft.checkpoints.locate import describe
from vlft.checkpoints.runs import read_run_config
from vlft.cli.check import run_check
from vlft.config import CheckConfig, ConvertConfig, InferConfig, SftConfig
from vlft.errors import CheckpointError, DataError, UsageError, VlftError, shown
from vlft.files import read_object
from vlft.inference.generate import Sampling, generate_replies
from vlft.schema import ANY
from vlft.training.failures import removed_if_idle
from vlft.training.lora import LoraOptions, add_lora


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SIGLIP.folder, tmp_path / "model")


class TestNumbers:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("part", ["vision_tower.blocks", "aligner", "lm_head"])
    def test_weights(self, copy, value, part):
        tensors = load_file(copy / "model.safetensors")
        name = next(n for n in tensors if part in n and tensors[n].dim() == 2)
        tensors[name][-1, -1] = value
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"no numbers \(NaN or infinite\)") as error:
            vlft.load(copy, device="cpu")
        assert "1 tensors" in str(error.value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_an_adapter(self, tmp_path, value):
        model, _ = vlft.load(SIGLIP.folder, device="cpu")
        peft = add_lora(model, describe(SIGLIP.folder).family, LoraOptions(rank=2))
        peft.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=r"no numbers \(NaN or infinite\)"):
            vlft.load(SIGLIP.folder, tmp_path / "adapter", device="cpu")

    @pytest.mark.parametrize(
        "fields", [{"r": 65536}, {"r": 3}, {"rank_pattern": {"layers.1.self_attn.q_proj": 40_000}}]
    )
    def test_a_rank_that_no_tensor_has(self, tmp_path, fields, monkeypatch):
        """It is seen before anything of that size is made."""
        model, _ = vlft.load(SIGLIP.folder, device="cpu")
        peft = add_lora(model, describe(SIGLIP.folder).family, LoraOptions(rank=2))
        peft.save_pretrained(tmp_path / "adapter")
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        monkeypatch.setattr("vlft.checkpoints.adapter.PeftModel", None)
        with pytest.raises(CheckpointError, match=r"has ranks up to 2, its adapter_config.json"):
            vlft.load(SIGLIP.folder, tmp_path / "adapter", device="cpu")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("temperature", [0.0, 1e-4, 1.0])
    def test_scores_of_a_reply(self, value, temperature):
        """Of the second record alone, so that one in a batch is enough."""
        model, processor = vlft.load(SIGLIP.folder, device="cpu")
        head = model.lm_head.forward

        def broken(hidden):
            scores = head(hidden)
            scores[-1, ..., 5] = value
            return scores

        model.lm_head.forward = broken
        prompts = [processor.encode({"query": text}) for text in ("a", "b")]
        with pytest.raises(VlftError, match=r"scores are no numbers") as error:
            generate_replies(model, processor, prompts, Sampling(3, temperature))
        assert error.value.exit_code == 1
        assert error.value.place == shown(SIGLIP.folder)

    @pytest.mark.parametrize("temperature", [1e-300, 1e-30, 9e-5])
    def test_a_temperature_that_divides_to_infinity(self, temperature):
        with pytest.raises(VlftError, match="--temperature"):
            Sampling(3, temperature)

    @pytest.mark.parametrize("size", ["1B", "0.5KB", "1e9GB", "-5GB", "5", "NaNGB"])
    def test_a_shard_of_a_tensor(self, tmp_path, size):
        with pytest.raises(VlftError, match="--max-shard-size"):
            convert(ConvertConfig(src=str(SIGLIP.folder), dst=tmp_path / "x", max_shard_size=size))
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("siglip", {"model_type": None}, "config.json: not a supported model"),
        ("hybrid", [], "global_attn_indexes: found \\[\\], at least one layer is needed"),
    ],
)
def test_a_config_is_named(tmp_path, name, change, said):
    folder = shutil.copytree(GOLDEN / "checkpoints" / f"deepseek-vl-{name}", tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    if name == "siglip":
        fields |= change
    else:
        fields["vision_config"]["params"]["high_res_cfg"]["global_attn_indexes"] = change
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=said):
        vlft.load(folder, device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        # What peft says of it holds text of the file.
        {"exclude_modules": "a" * 99},
        # Null counts as absent.
        {"lora_dropout": None, "rank_pattern": None, "alpha_pattern": None, "bias": None},
    ],
)
def test_fields_of_an_adapter_that_say_nothing(tmp_path, fields, recwarn):
    model, _ = vlft.load(SIGLIP.folder, device="cpu")
    peft = add_lora(model, describe(SIGLIP.folder).family, LoraOptions(rank=2))
    peft.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    vlft.load(SIGLIP.folder, tmp_path / "adapter", device="cpu")
    assert not [warning for warning in recwarn if "aaa" in str(warning.message)]


def test_a_token_that_is_no_text(copy):
    path = copy / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "pad_token": {"content": "\ud800"}}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: pad_token: found"):
        vlft.load(copy, device="cpu")


def test_settings_of_a_run_without_its_model(tmp_path):
    (tmp_path / "run_config.json").write_text('{"max_steps": 1}')
    with pytest.raises(CheckpointError, match=r"run_config.json: has no model"):
        read_run_config(tmp_path)


def test_a_key_that_stands_twice_is_said_once(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"a": {"hidden_size": 8, "hidden_size": 16}}')
    for _ in range(2):
        assert read_object(tmp_path / "config.json", ANY) == {"a": {"hidden_size": 16}}
    assert capsys.readouterr().err.count("'hidden_size' stands twice in an object") == 1


@pytest.mark.parametrize("blank", ["", "  \n"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_empty_text_of_the_history_is_said(blank, place):
    pair = ["q", "r"]
    pair[place] = blank
    row = {"query": "a", "response": "b", "history": [pair]}
    with pytest.raises(DataError, match='"history" is empty'):
        describe(SIGLIP.folder).processor().encode(row)


class TestCodeInFiles:
    def convert(self, copy, tmp_path, **fields):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **fields}))
        done = convert(ConvertConfig(src=str(copy), dst=tmp_path / "new", format="original"))
        return json.loads((done / "config.json").read_text())

    @pytest.mark.parametrize(
        "fields",
        [
            {"auto_map": {"AutoModel": "evil/repo--modeling.Model"}},
            {"auto_map": {"AutoConfig": "a.B", "AutoModel": ["evil/repo--modeling.M", None]}},
            {"auto_map": "evil/repo--modeling.Model"},
            {"x": [{"auto_map": {"AutoModel": "evil/deepseek-ai/--modeling.Model"}}]},
        ],
    )
    def test_code_of_others_is_left_out(self, copy, tmp_path, capsys, fields):
        written = self.convert(copy, tmp_path, **fields)
        assert "evil" not in json.dumps(written)
        said = capsys.readouterr().err.replace("\n", " ")
        assert "auto_map is left out, it names code of others: config.json: evil/" in said

    def test_what_is_kept_is_listed(self, copy, tmp_path, capsys):
        fields = {"auto_map": {"AutoModel": "deepseek-ai/x--modeling.M", "AutoConfig": "a.B"}}
        (copy / "chat_template.jinja").write_text("{{ messages }}")
        assert self.convert(copy, tmp_path, **fields)["auto_map"] == fields["auto_map"]
        said = " ".join(capsys.readouterr().err.split())
        assert "for other programs to run: auto_map of config.json, chat_template.jinja" in said
        assert (tmp_path / "new" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_loss_of_the_base_that_is_no_number_names_the_base(copy, tmp_path, monkeypatch):
    """A finite base whose scores overflow: --learning-rate is not the remedy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"query": "a", "response": "b"}\n' * 3)
    tensors = load_file(copy / "model.safetensors")
    name = "language_model.model.norm.weight"
    tensors[name] = torch.full_like(tensors[name], 1e38)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    config = SftConfig(model=str(copy), dataset=("t.jsonl",), val_ratio=0, max_steps=2)
    with pytest.raises(VlftError, match="the base model") as error:
        vlft.sft(config)
    assert "--learning-rate" not in str(error.value)


@pytest.mark.parametrize(("steps", "stays"), [([], False), ([0], False), ([0, 1], True)])
def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path, steps, stays):
    run = tmp_path / "model" / "v0-x"
    run.mkdir(parents=True)
    rows = [{"step": step, "val_loss": 1.0} for step in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(VlftError), removed_if_idle(run, writes=True):
        raise VlftError("the gradient norm is nan")
    assert (tmp_path / "model").exists() == stays


class TestNames:
    """Of files: bytes that are not UTF-8, links in a circle, pipes."""

    @pytest.fixture(autouse=True)
    def _inside(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def check(self, name, **settings):
        run_check(CheckConfig(dataset=(name,), **settings))

    def test_the_name_of_an_image_is_not_guessed(self, tmp_path):
        (tmp_path / os.fsdecode(b"\xe9.png")).write_bytes(b"no image")
        row = {"query": "<image>", "response": "b", "images": ["\xe9.png"]}
        (tmp_path / "i.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match="no such image"):
            self.check("i.jsonl")

    def test_bytes_that_are_not_utf_8_are_saved_and_read(self, tmp_path):
        name = os.fsdecode(b"\xff\xfe.jsonl")
        (tmp_path / name).write_text('{"query": "a", "response": "b"}\n' * 2)
        config = SftConfig(model=str(SIGLIP.folder), dataset=(name,), val_ratio=0, max_steps=1)
        result = vlft.sft(dataclasses.replace(config, device="cpu", show_sample=False))
        assert read_run_config(result.run).dataset == (str(tmp_path / name),)
        answers = vlft.infer(
            InferConfig(ckpt_dir=result.run, dataset=(name,), max_new_tokens=1, show_samples=0)
        )
        assert answers.count == 2

    @pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
    @pytest.mark.parametrize("kind", ["pipe", "circle", "device", "folder link"])
    def test_what_is_no_regular_file(self, tmp_path, ending, kind):
        path = tmp_path / f"data{ending}"
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to({"circle": path, "device": "/dev/zero"}.get(kind, tmp_path))
        with pytest.raises(VlftError) as error:
            self.check(path.name)
        assert error.value.place.startswith(path.name)
        assert error.value.exit_code == 2

    @pytest.mark.parametrize("kind", ["pipe", "circle", "device"])
    def test_an_image_that_is_none(self, tmp_path, kind):
        path = tmp_path / "a.png"
        os.mkfifo(path) if kind == "pipe" else path.symlink_to(
            {"circle": path, "device": "/dev/zero"}[kind]
        )
        row = {"query": "<image>", "response": "b", "images": ["a.png"]}
        (tmp_path / "i.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=r"i\.jsonl:1: a\.png: "):
            self.check("i.jsonl")


@pytest.mark.parametrize("name", ["dataset", "val_dataset"])
@pytest.mark.parametrize("value", [{"query": "a"}, [{"query": "a", "response": "b"}], ["a", {}]])
def test_settings_in_a_file_name_data_files_and_hold_no_records(tmp_path, name, value):
    (tmp_path / "run_config.json").write_text(json.dumps({"model": "m", name: value}))
    with pytest.raises(UsageError, match=rf"run_config\.json: {name}: found .*, text is allowed"):
        read_run_config(tmp_path)
