"""Servers fail on a missing key: merged folders have all they read, and docs/deploy.md runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN, SIGLIP
from PIL import Image
from served import make_adapter
from tokenizers import Tokenizer

import vlft
from vlft.checkpoints.weights import read_tensors

CONTRACTS = json.loads((Path(__file__).parent / "contracts.json").read_text("utf-8"))
CASES = [
    pytest.param(contract, name, id=f"{contract['server']}-{name}")
    for contract in CONTRACTS
    for name in contract["checkpoints"]
]
DOC = Path(__file__).parent.parent / "docs" / "deploy.md"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A function that merges an adapter into a golden checkpoint, once for each format."""
    home = tmp_path_factory.mktemp("deploy")
    made: dict[tuple[str, str], Path] = {}

    def merge(name, layout):
        if (name, layout) not in made:
            base = GOLDEN / "checkpoints" / name
            adapter = home / f"adapter-{name}"
            if not adapter.exists():
                make_adapter(base, adapter, 1)
            made[name, layout] = vlft.merge_lora(
                vlft.MergeLoraConfig(
                    ckpt_dir=adapter, output_dir=home / f"{name}-{layout}", format=layout
                )
            ).folder
        return made[name, layout]

    return merge


def value_at(content, path):
    for name in path.split("."):
        content = content[name]
    return content


@pytest.mark.parametrize(("contract", "name"), CASES)
def test_a_merged_folder_has_what_is_read(merged, contract, name):
    base, folder = GOLDEN / "checkpoints" / name, merged(name, contract["format"])
    original = contract["format"] == "original"
    assert {*contract["files"]} <= {path.name for path in folder.iterdir()}
    for file in ("config", "processor_config", "preprocessor_config"):
        wanted = contract.get(file, {})
        found, before = (
            json.loads(text.read_text("utf-8")) if text.exists() else {}
            for text in (folder / f"{file}.json", base / f"{file}.json")
        )
        for path, value in wanted.items():
            if value is not None:
                assert value_at(found, path) == value, path
            elif original:
                assert value_at(found, path) == value_at(before, path), path
            else:
                assert value_at(found, path) is not None, path
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert all(tokenizer.token_to_id(token) is not None for token in contract.get("tokens", ()))
    names = [key for key, _ in read_tensors(folder)]
    patterns = [re.compile(pattern) for pattern in contract["tensors"]]
    assert all(any(pattern.match(key) for key in names) for pattern in patterns)
    assert all(any(pattern.match(key) for pattern in patterns) for key in names)
    if original:
        # Those too that no module of ours uses: servers build timm's whole tower.
        assert {*names} == {key for key, _ in read_tensors(base)}


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("deepseek-vl2-noaux", "DeepseekVLV2ForCausalLM"),
        ("deepseek-ocr", "DeepseekOCRForCausalLM"),
    ],
)
def test_the_classes_of_vllm_take_it(merged, name, architecture):
    configs = pytest.importorskip(
        "vllm.transformers_utils.configs.deepseek_vl2", reason="vLLM is not installed"
    )
    found = json.loads((merged(name, "original") / "config.json").read_text("utf-8"))
    config = configs.DeepseekVLV2Config(**found)
    assert config.architectures == [architecture]
    assert config.text_config.vocab_size == found["language_config"]["vocab_size"]


def test_every_family_is_in_the_table():
    text = DOC.read_text("utf-8")
    for title in ("DeepSeek-VL2", "DeepSeek-VL", "Janus", "DeepSeek-OCR", "DeepSeek-OCR-2"):
        assert re.search(rf"^\| {re.escape(title)}\b", text, re.M), title
    # Who is said to serve a format is held to it above.
    assert {contract["server"].split()[0] for contract in CONTRACTS} <= {
        "vLLM", "sglang", "llama.cpp", "the"
    }  # fmt: skip


def test_its_code_runs(merged, tmp_path, monkeypatch, capsys):
    """With the tiny model; the replies are those of vlft."""
    folder = merged(SIGLIP.checkpoint, "transformers")
    adapter = folder.parent / f"adapter-{SIGLIP.checkpoint}"
    shutil.copytree(folder, tmp_path / "merged")
    shutil.copytree(adapter, tmp_path / "adapter")
    # Of the tower's size: transformers resizes by its own resampling.
    with Image.open(GOLDEN / "images" / "chart.png") as image:
        image.convert("RGB").resize((96, 96)).save(tmp_path / "page.png")
    vlft.convert(
        vlft.ConvertConfig(src=str(SIGLIP.folder), dst=tmp_path / "base", format="transformers")
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    capsys.readouterr()
    replies = []
    for block in re.findall(r"^```python\n(.*?)^```", DOC.read_text("utf-8"), re.M | re.S):
        exec(compile(block, str(DOC), "exec"), names)
        replies.append(capsys.readouterr().out.strip())
    row = {"query": "<image>What is it?", "images": ["page.png"]}
    expected = [
        vlft.generate(*vlft.load(*given, dtype="float32", device="cpu"), [row], 32)[0].text
        for given in (("merged",), ("base", "adapter"))
    ]
    assert replies == expected
