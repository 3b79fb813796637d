"""Which of several weights in a folder are read, and what is said of the others."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import JANUS, SIGLIP, VL2_MLA, logits, only_siglip
from safetensors.torch import save_file
from transformers import DeepseekVLForConditionalGeneration

from vlft.checkpoints.convert import convert
from vlft.checkpoints.export import export_model
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.weights import read_tensors
from vlft.config import ConvertConfig

CPU = Placement(torch.device("cpu"), torch.float32)
SETS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def write_set(folder, name, weights):
    """A whole set of weights, in two files if its name is that of an index."""
    save = torch.save if ".bin" in name else save_file
    if not name.endswith(".index.json"):
        save(weights, folder / name)
        return
    names = sorted(weights)
    stem, _, suffix = name.removesuffix(".index.json").rpartition(".")
    table = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"{stem}-{number}.{suffix}"
        save({key: weights[key] for key in part}, folder / file)
        table.update(dict.fromkeys(part, file))
    (folder / name).write_text(json.dumps({"weight_map": table}))


def small_files(case, folder):
    for path in case.folder.iterdir():
        if path.suffix == ".json" and ".index." not in path.name:
            shutil.copy(path, folder)


@pytest.mark.parametrize("case", [SIGLIP, JANUS, VL2_MLA], indirect=True, scope="session", ids=str)
@pytest.mark.parametrize("first", range(3))
def test_the_first_set_in_the_order_of_transformers(case, tmp_path, capsys, first):
    weights = {name: tensor.clone() for name, tensor in read_tensors(case.folder)}
    small_files(case, tmp_path)
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    for number, name in enumerate(SETS[first:]):
        write_set(tmp_path, name, {**weights, head: weights[head] * (1 + number)})
    model = load_model(describe(tmp_path), CPU)
    assert torch.equal(model.lm_head.weight, weights[head].float())
    said = capsys.readouterr().err
    assert f"{SETS[first]} is read, {', '.join(SETS[first + 1 :])} is left aside" in said


@only_siglip
def test_one_set_is_not_spoken_of(case, capsys):
    load_model(describe(case.folder), CPU)
    assert capsys.readouterr().err == ""


@pytest.fixture
def says_tied(folder, model, tmp_path):
    """A folder in transformers' layout whose config.json says tied, and a function to fill it."""

    def make(head):
        model.lm_head.weight.data = head
        export_model(model, folder, tmp_path, layout="transformers", dtype=None)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
        return tmp_path

    return make


@only_siglip
class TestTied:
    def test_another_head_in_the_files_is_used(self, model, inputs, says_tied, capsys):
        path = says_tied(model.lm_head.weight.roll(3, 0).clone())
        expected = logits(model, inputs)
        loaded = load_model(describe(path), CPU)
        assert "lm_head that differs from the embedding" in capsys.readouterr().err
        assert torch.equal(logits(loaded, inputs), expected)
        theirs = DeepseekVLForConditionalGeneration.from_pretrained(path)
        assert torch.equal(logits(theirs, inputs), expected)

    def test_it_is_converted(self, model, inputs, says_tied, tmp_path_factory, capsys):
        path, new = says_tied(-model.lm_head.weight), tmp_path_factory.mktemp("new") / "model"
        convert(ConvertConfig(src=str(path), dst=new))
        capsys.readouterr()
        assert torch.equal(logits(load_model(describe(new), CPU), inputs), logits(model, inputs))
        assert capsys.readouterr().err == ""

    def test_the_same_head_is_tied(self, model, says_tied, capsys):
        loaded = load_model(describe(says_tied(model.get_input_embeddings().weight.clone())), CPU)
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("case", [VL2_MLA], indirect=True, scope="session", ids=str)
@pytest.mark.parametrize("heads", [None, 1, 2, 32])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_latent_attention_ignores_key_value_heads(case, model, inputs, tmp_path, heads, attn):
    copy = shutil.copytree(case.folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    config["language_config"].update(num_key_value_heads=heads)
    if heads is None:
        del config["language_config"]["num_key_value_heads"]
    (copy / "config.json").write_text(json.dumps(config))
    placement = Placement(torch.device("cpu"), torch.float32, attn=attn)
    found = logits(load_model(describe(copy), placement), inputs)
    assert (found - logits(model, inputs)).norm() < 1e-5 * found.norm()
