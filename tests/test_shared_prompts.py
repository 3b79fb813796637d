"""Prompts that share work are answered as each is alone."""

from __future__ import annotations

import pytest
from conftest import GOLDEN

from vlft.inference.generate import Sampling
from vlft.inference.prefill import can_share
from vlft.inference.replier import Replier

TOKENS = 12


@pytest.fixture(scope="module")
def prompts(case, processor):
    """Three questions on one image, one on another, text, and what dialogues have."""
    rows = [
        {"query": "<image>What is it?", "images": ["photo_a.jpg"]},
        {
            "query": "<image>What is number 1 there, and how many are there?",
            "images": ["photo_a.jpg"],
        },
        {"query": "<image>What is it?", "images": ["chart.png"]},
        {"query": "Hello."},
        {"query": "<image>What is it now?", "images": ["photo_a.jpg"]},
    ]
    if not case.image_mode:
        rows += [
            {"query": "And <image>?", "images": ["photo_a.jpg", "chart.png"],
             "history": [["<image>What is it?", "It is 1."]]},
            {"query": "And now?", "images": ["photo_a.jpg"],
             "history": [["<image>What is it?", "It is 1."]]},
        ]  # fmt: skip
    return [processor.encode(row, GOLDEN / "images") for row in rows]


@pytest.fixture(scope="module")
def expected(shared_model, processor, prompts):
    """Of transformers' own generation, each prompt alone."""
    found = []
    for prompt in prompts:
        inputs = processor.collate([prompt])
        del inputs["labels"]
        output = shared_model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=processor.chat.eos_id,
            pad_token_id=processor.chat.pad_id,
        )  # fmt: skip
        found.append(output[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    ("batches", "chunk"),
    [
        pytest.param([[0], [1], [2], [3], [4], [5], [6]], None, id="shared"),
        pytest.param([[0, 1, 2, 3, 4, 5, 6]], None, id="batched"),
        pytest.param([[6, 4, 1], [0], [5, 3, 2]], None, id="both"),
        pytest.param([[0, 1, 2, 3, 4, 5, 6]], 50, id="chunks"),
        pytest.param([[1, 0]], 1, id="one token at a time"),
    ],
)
def test_replies_are_those_of_each_alone(
    shared_model, processor, prompts, expected, batches, chunk
):
    assert can_share(prompts, processor)
    batches = [[n for n in batch if n < len(prompts)] for batch in batches]
    batches = [batch for batch in batches if batch]
    if chunk == 1:
        prompts = [prompts[3], prompts[3]]
        expected = [expected[3], expected[3]]
    replier = Replier(shared_model, processor, Sampling(TOKENS, no_repeat_ngram=0), chunk=chunk)
    made = list(replier.replies(prompts, [0] * len(prompts), batches))
    assert [[reply.token_ids for reply in batch] for batch in made] == [
        [expected[number] for number in batch] for batch in batches
    ]
