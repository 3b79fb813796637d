"""Tokenizers with letters among their added tokens, which the byte-level decoder takes for bytes.

``tokenizers/added_letters.json`` is made like DeepSeek-LLM's: the thirteen letters that stand for
bytes which UTF-8 never uses are no part of its vocabulary but added tokens, which are not special.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SIGLIP
from tokenizers import Tokenizer

from vlft.checkpoints.locate import describe
from vlft.console import out
from vlft.errors import CheckpointError
from vlft.inference.streaming import ConsoleStreamer
from vlft.training.preview import _sample_text

FIXTURE = Path(__file__).parent / "tokenizers" / "added_letters.json"
LETTERS = "øöúÿõ÷ûýÀùÁþü"
TEXTS = [
    LETTERS,
    " ".join(LETTERS),
    "Köln, Menü, où, Müller, ½ ÷ ∑",
    "Á la übÿ 你好ü🎉ö",
    "o\u0308 is not ö",
    "a\ufffdü",
    "plain text",
    "é ä ñ",
]


@pytest.fixture
def copy(tmp_path):
    """A function that makes a model folder with this tokenizer in it."""

    def make(tokenizer):
        for path in SIGLIP.folder.iterdir():
            if path.suffix == ".json":
                shutil.copy(path, tmp_path)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
        shutil.copy(SIGLIP.folder / "model.safetensors", tmp_path)
        return describe(tmp_path)

    return make


@pytest.fixture
def processor(copy):
    return copy(json.loads(FIXTURE.read_text("utf-8"))).processor()


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_encoded_is_decoded(processor, text):
    ids = processor.chat.tokenizer.encode(text, add_special_tokens=False).ids
    assert processor.text(ids) == text
    assert processor.decode([processor.chat.bos_id, *ids, processor.chat.eos_id]) == text


def test_the_library_would_not():
    tokenizer = Tokenizer.from_file(str(FIXTURE))
    assert tokenizer.decode(tokenizer.encode("Köln").ids) == "K\ufffdln"


def test_special_tokens_are_dropped_and_others_are_not(processor):
    ids = processor.chat.tokenizer.encode("ü<image_placeholder>ö<｜place▁holder｜>").ids
    assert processor.decode(ids) == "üö<｜place▁holder｜>"
    assert processor.text(ids) == "ü<image_placeholder>ö<｜place▁holder｜>"


def test_the_shown_sample(processor):
    sample = processor.encode({"query": "Où?", "response": "Köln ÷ ü"})
    assert _sample_text(sample, processor, marks=True).plain.endswith(
        "User: Où?\n\nAssistant:⟦ Köln ÷ ü<｜end▁of▁sentence｜>⟧"
    )


def test_a_reply_is_the_same_in_the_history(processor):
    """What the model wrote is what it reads in the next turn."""
    ids = processor.chat.tokenizer.encode("Menü für 你").ids
    rows = [
        {"query": "q", "history": [["p", text]]} for text in ("Menü für 你", processor.decode(ids))
    ]
    first, second = (processor.encode(row).input_ids.tolist() for row in rows)
    assert first == second


def test_the_stream(processor, monkeypatch):
    buffer = io.StringIO()
    monkeypatch.setattr(out, "_file", buffer)
    streamer = ConsoleStreamer(processor, (), one_line=False)
    for ids in ([0], *processor.chat.tokenizer.encode("Köln你ü🎉").ids):
        streamer.put(torch.tensor(ids))
    streamer.end()
    assert buffer.getvalue() == "Köln你ü🎉\n"


def test_ids_beyond_the_embeddings_are_refused(copy):
    tokenizer = json.loads(FIXTURE.read_text("utf-8"))
    rows = json.loads((SIGLIP.folder / "config.json").read_text())["language_config"]["vocab_size"]
    vocab = tokenizer["model"]["vocab"]
    for token in tokenizer["added_tokens"]:
        vocab[token["content"]] = token["id"]
    vocab.update({f"word{number}": number for number in range(len(vocab), rows)})
    assert copy(tokenizer).processor().chat.image_token_id < rows
    vocab["word"] = rows
    with pytest.raises(CheckpointError, match=f"token id is {rows}, the model has {rows} emb"):
        copy(tokenizer).processor()
