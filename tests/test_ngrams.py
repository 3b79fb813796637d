"""Replies without repeated sequences of tokens, and replies that become a loop."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDEN, OCR, OCR2

from vlft.checkpoints.locate import describe
from vlft.families.image_settings import ImageSettings
from vlft.inference import decoding
from vlft.inference.decoding import LOOP_PIECE, LOOP_TOKENS, Loops, NoRepeatNgram, is_loop
from vlft.inference.generate import Sampling, generate_replies


def ngram_case(case) -> dict:
    return json.loads((case.cases / "ngram.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("case", "mode", "sizes"),
    [(OCR, "tiny", (35, 2, 1)), (OCR2, "small", (2,))],
    indirect=["case"],
    ids=["deepseek-ocr", "deepseek-ocr2"],
)
def test_the_authors_tokens(case, mode, sizes, shared_model):
    """Theirs count the whole sequence, image tokens too."""
    data = ngram_case(case)
    processor = ImageSettings(image_mode=mode).apply(describe(case.folder).processor())
    (message, _) = data["conversation"]
    sample = processor.encode({"query": message["content"], "images": message["images"]}, GOLDEN)
    for size in sizes:
        sampling = Sampling(48, no_repeat_ngram=size)
        (reply,) = generate_replies(shared_model, processor, [sample], sampling)
        expected = data[f"generated_ids_ngram{size}"]
        assert reply.token_ids == expected[: len(reply.token_ids)]
        assert reply.finish == "stop" or len(reply.token_ids) == 48


@pytest.mark.parametrize("row", ngram_case(OCR)["windowed_processor"]["rows"])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_authors_window(row, padding):
    ids = torch.tensor([[3] * padding + row["ids"]])
    size, window, exempt = (row[key] for key in ("ngram_size", "window_size", "whitelist"))
    ban = NoRepeatNgram(size, [padding], window, exempt)
    # Token by token, as in generation.
    for end in range(padding + 1, ids.shape[1] + 1):
        scores = ban(ids[:, :end], torch.zeros(1, 5))
    assert scores[0].isinf().nonzero().flatten().tolist() == row["banned"]
    assert not ban(ids[:, :padding], torch.zeros(1, 5)).isnan().any()


@pytest.mark.parametrize("case", [OCR], indirect=True, ids=str)
def test_a_reply_does_not_depend_on_its_batch(shared_model, processor):
    rows = [{"query": "Hi."}, {"query": "What is the number in the image, and how large is it?"}]
    prompts = [processor.encode(row) for row in rows]
    for settings in ({"no_repeat_ngram": 1}, {"no_repeat_ngram": 1, "ngram_window": 8}):
        sampling = Sampling(24, **settings)
        alone = [generate_replies(shared_model, processor, [p], sampling)[0] for p in prompts]
        assert generate_replies(shared_model, processor, prompts, sampling) == alone
        usual = generate_replies(shared_model, processor, prompts, Sampling(24, no_repeat_ngram=0))
        assert [reply.token_ids for reply in usual] != [reply.token_ids for reply in alone]


@pytest.mark.parametrize("period", [1, 7, LOOP_PIECE, LOOP_PIECE + 1])
def test_a_loop_is_seen(period):
    piece = torch.arange(period)
    tokens = piece.repeat(LOOP_TOKENS // period + 1)[:LOOP_TOKENS]
    assert is_loop(tokens) == (period <= LOOP_PIECE)
    changed = tokens.clone()
    changed[LOOP_TOKENS // 2] = -1
    assert not is_loop(changed)
    ids = torch.stack([torch.cat([torch.tensor([9]), t]) for t in (tokens, changed)])
    loops = Loops(1, 2)
    assert loops(ids, None).tolist() == [period <= LOOP_PIECE, False]
    assert loops.ends == [LOOP_TOKENS if period <= LOOP_PIECE else None, None]


@pytest.mark.parametrize("case", [OCR], indirect=True, ids=str)
def test_the_result_says_that_a_reply_was_a_loop(shared_model, processor, monkeypatch):
    monkeypatch.setattr(decoding, "LOOP_TOKENS", 4)
    monkeypatch.setattr(decoding, "LOOP_PIECE", 2)
    monkeypatch.setattr(decoding, "is_loop", lambda tokens: True)
    prompt = processor.encode({"query": "Hello there."})
    (reply,) = generate_replies(shared_model, processor, [prompt], Sampling(12))
    assert (reply.finish, len(reply.token_ids)) == ("loop", 4)
