"""``--num-beams``: the beam search of transformers, on prompts that share work."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from conftest import GOLDEN, OCR, SIGLIP

import vlft
from vlft.console import out
from vlft.errors import ConfigError, DataError
from vlft.inference.chat import chat
from vlft.inference.generate import Sampling, generate_replies
from vlft.inference.replier import Replier
from vlft.models.cache_name import CACHE

TOKENS = 6
BEAMS = 3


@pytest.fixture(scope="module")
def prompts(case, processor):
    """Two questions on one image, a text, and a dialogue with two images."""
    rows = [
        {"query": "<image>What is it?", "images": ["photo_a.jpg"]},
        {"query": "<image>What is number 1 there?", "images": ["photo_a.jpg"]},
        {"query": "Hello."},
    ]
    if not case.image_mode:
        rows.append(
            {"query": "And <image>?", "images": ["photo_a.jpg", "chart.png"],
             "history": [["<image>What is it?", "It is 1."]]}
        )  # fmt: skip
    return [processor.encode(row, GOLDEN / "images") for row in rows]


def searched(model, processor, prompt, **settings) -> list[int]:
    """The tokens of transformers' own beam search, of one prompt alone.

    Its ``generate`` would give the tiles of an image to the wrong beams: it takes keys and values.
    """
    inputs = processor.collate([prompt])
    del inputs["labels"]
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
    cache.crop(-1)
    cache.batch_repeat_interleave(BEAMS)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    chat = processor.chat
    output = model.generate(
        **given, **{CACHE: cache}, max_new_tokens=TOKENS, do_sample=False, num_beams=BEAMS,
        eos_token_id=chat.eos_id, pad_token_id=chat.pad_id, **settings,
    )  # fmt: skip
    ids = output[0, len(prompt) :].tolist()
    return ids[: ids.index(chat.eos_id) + 1] if chat.eos_id in ids else ids


def test_replies_are_those_of_transformers(shared_model, processor, prompts):
    expected = [searched(shared_model, processor, prompt) for prompt in prompts]
    sampling = Sampling(TOKENS, no_repeat_ngram=0, num_beams=BEAMS)
    replier = Replier(shared_model, processor, sampling)
    numbers = list(range(len(prompts)))
    for batches in ([[n] for n in numbers], [numbers]):
        made = list(replier.replies(prompts, numbers, batches))
        assert [reply.token_ids for batch in made for reply in batch] == expected
    greedy = generate_replies(shared_model, processor, prompts, Sampling(TOKENS, no_repeat_ngram=0))
    assert [reply.token_ids for reply in greedy] != expected


@pytest.mark.parametrize("case", [OCR], indirect=True, ids=str, scope="session")
def test_no_beam_repeats_what_another_said(shared_model, processor, prompts):
    """Hypotheses change places from step to step; what has occurred is known of each."""
    ours = Sampling(TOKENS, no_repeat_ngram=1, num_beams=BEAMS)
    found = generate_replies(shared_model, processor, prompts, ours)
    expected = [searched(shared_model, processor, p, no_repeat_ngram_size=1) for p in prompts]
    assert [reply.token_ids for reply in found] == expected


@pytest.mark.only_siglip
class TestEnds:
    def test_before_a_text(self, shared_model, processor, prompts):
        """A hypothesis that says it is finished, as one with the token of the end."""
        sampling = Sampling(TOKENS, num_beams=BEAMS)
        (whole,) = generate_replies(shared_model, processor, prompts[:1], sampling)
        stop = processor.reply_text(whole.token_ids)[2:4]
        sampling = Sampling(TOKENS, num_beams=BEAMS, stop=(stop,))
        together = generate_replies(shared_model, processor, prompts, sampling)
        alone = [generate_replies(shared_model, processor, [p], sampling)[0] for p in prompts]
        assert together == alone
        for reply in together:
            said = processor.reply_text(reply.token_ids)
            assert stop not in reply.text
            assert (stop in said) <= (reply.finish == "stop")

    def test_at_the_limit(self, shared_model, processor, prompts):
        for reply in generate_replies(shared_model, processor, prompts, Sampling(3, num_beams=2)):
            ended = processor.chat.eos_id in reply.token_ids
            assert reply.finish == ("stop" if ended else "length")
            assert ended or len(reply.token_ids) == 3

    def test_a_chat_shows_it_at_its_end(self, shared_model, processor, monkeypatch):
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        sampling = Sampling(TOKENS, num_beams=BEAMS)
        chat(shared_model, processor, sampling, system=None, lines=io.StringIO("Hi.\n"))
        prompt = processor.encode({"query": "Hi."})
        (reply,) = generate_replies(shared_model, processor, [prompt], sampling)
        assert buffer.getvalue() == reply.text.replace("\n", "\\n") + "\n"


@pytest.mark.only_siglip
class TestRefused:
    def test_samples(self):
        found = "--num-beams: found 2 with --temperature 0.5; a beam search draws no samples"
        with pytest.raises(ConfigError, match=found):
            Sampling(temperature=0.5, num_beams=2)
        with pytest.raises(ConfigError, match=found):
            vlft.infer(vlft.InferConfig(model=str(SIGLIP.folder), temperature=0.5, num_beams=2))

    def test_a_prompt_that_ends_with_an_image(self, shared_model, processor):
        prompt = processor.encode(
            {"query": "<image>", "images": ["photo_a.jpg"]}, GOLDEN / "images"
        )
        end = int(torch.where(prompt.input_ids == processor.chat.image_token_id)[0][-1]) + 1
        cut = dataclasses.replace(
            prompt, input_ids=prompt.input_ids[:end], labels=prompt.labels[:end]
        )
        with pytest.raises(DataError, match="--num-beams: a prompt ends with an image"):
            generate_replies(shared_model, processor, [cut], Sampling(3, num_beams=2))
