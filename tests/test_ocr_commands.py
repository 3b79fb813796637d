"""DeepSeek-OCR and OCR-2 through the commands: sft, resume, infer, merge-lora, convert, nf4."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, OCR, OCR2, FamilyCase, write_jsonl
from safetensors.torch import load_file

from vlft.checkpoints.locate import describe
from vlft.checkpoints.weights import read_tensors
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings

BOTH = pytest.mark.parametrize("ocr", [OCR, OCR2], ids=str, scope="module")
QUERY = "<image>\nFree OCR."


def vlft(command: str, *words: object) -> None:
    """Runs a command in this process, from its words."""
    known = COMMANDS[command]
    known.run(*read_settings(known.config, command, [str(word) for word in words]))


def records():
    rows = [
        {"query": QUERY, "response": f"Page {index}.", "images": [name]}
        for index, name in enumerate(("chart.png", "photo_a.jpg", "chart.png"))
    ]
    return [*rows, {"query": "Say yes.", "response": "yes"}]


def tune(ocr: FamilyCase, home, *words):
    """The newest checkpoint of a run of two steps."""
    data = write_jsonl(home / "data.jsonl", records())
    vlft(
        *["sft", "--model", ocr.folder, "--dataset", data, "--image-root", GOLDEN / "images"],
        *["--image-mode", ocr.image_mode, "--val-ratio", 0, "--batch-size", 2, "--max-steps", 2],
        *["--save-steps", 1, "--learning-rate", 1e-2, "--no-show-sample", "--device", "cpu"],
        *["--output-dir", home, *words],
    )
    return max(home.glob("*/v*/checkpoint-2"))


@pytest.fixture(scope="module")
def checkpoint(ocr, tmp_path_factory):
    return tune(ocr, tmp_path_factory.mktemp("run"), "--lora-target-modules", "ALL")


def answers(path, *words):
    vlft(
        *["infer", "--image", GOLDEN / "images" / "chart.png", "--query", QUERY, "--output", path],
        *["--max-new-tokens", 6, "--show-samples", 0, "--device", "cpu", "--overwrite", *words],
    )
    return [json.loads(line)["response"] for line in path.read_text("utf-8").splitlines()]


@BOTH
def test_tune_answer_merge_convert(ocr, checkpoint, tmp_path):
    """A merged model gives the replies of base and adapter, in both layouts.

    It also keeps the image mode of the run, without a flag.
    """
    base = answers(tmp_path / "base.jsonl", "--model", ocr.folder, "--image-mode", ocr.image_mode)
    tuned = answers(tmp_path / "tuned.jsonl", "--ckpt-dir", checkpoint)
    assert tuned != base
    merged, native, back = (tmp_path / name for name in ("merged", "native", "back"))
    given = ["--ckpt-dir", checkpoint, "--output-dir", merged, "--dtype", "float32"]
    vlft("merge-lora", *given)
    assert describe(merged).processor().pixels.fingerprint == (
        describe(ocr.folder).processor().pixels.in_mode(ocr.image_mode).fingerprint
    )
    assert answers(tmp_path / "merged.jsonl", "--model", merged) == tuned
    vlft("convert", merged, native, "--format", "transformers")
    assert answers(tmp_path / "native.jsonl", "--model", native) == tuned
    vlft("convert", native, back, "--format", "original")
    before, after = dict(read_tensors(merged)), dict(read_tensors(back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@BOTH
def test_a_resumed_run_has_the_same_weights_bit_for_bit(ocr, checkpoint, tmp_path):
    straight = load_file(checkpoint / "adapter_model.safetensors")
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.parent, copy, symlinks=True)
    vlft("sft", "--resume", copy / "checkpoint-1", "--overwrite", "--no-show-sample")
    again = load_file(copy / "checkpoint-2" / "adapter_model.safetensors")
    assert again.keys() == straight.keys()
    assert all(torch.equal(again[name], straight[name]) for name in again)
    assert any(tensor.any() for name, tensor in again.items() if "lora_B" in name)


@BOTH
def test_nf4_holds_the_experts_in_4_bit_and_trains(ocr, tmp_path):
    checkpoint = tune(ocr, tmp_path, "--quantize", "nf4", "--lora-target-modules", "ALL")
    moved = load_file(checkpoint / "adapter_model.safetensors")
    assert all(moved[name].any() for name in moved if "lora_B" in name and "q_proj" in name)
    assert len(answers(tmp_path / "a.jsonl", "--ckpt-dir", checkpoint)) == 1
