"""``--stop``: replies end before texts, in batches, in beams and while they stream."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from conftest import GOLDEN, SIGLIP, write_jsonl

import vlft
from vlft.console import out
from vlft.errors import CheckpointError, ConfigError
from vlft.inference.chat import chat
from vlft.inference.generate import Sampling, generate_replies
from vlft.inference.stops import Stops, certain_text, text_before

ROWS = [
    {"query": "Hi."},
    {"query": "<image>What is it?", "images": ["photo_a.jpg"]},
    {"query": "And what is the number there, if there is one?"},
]


def test_the_first_stop_counts():
    assert text_before("It is 12. Or 3.", ["Or", ". "]) == "It is 12"
    assert text_before("It is 12.", ["Or"]) is None
    assert text_before("It is 12.", []) is None


def test_what_is_certain_of_a_growing_text():
    stops = ["\nUser:", "###"]
    assert certain_text("Yes. ##", stops) == "Yes. "
    assert certain_text("Yes. #1", stops) == "Yes. #1"
    assert certain_text("Yes.\nUse", stops) == "Yes."
    assert certain_text("Yes.\nUsed", stops) == "Yes.\nUsed"
    assert certain_text("Yes.\nUser: No", stops) == "Yes."
    assert certain_text("Yes.", []) == "Yes."


@pytest.mark.parametrize("stop", ["世", "lo 世", " Hello", "界!"])
def test_a_text_is_seen_whatever_tokens_spell_it(processor, stop):
    """Characters of several tokens, and tokens without a text between them, too."""
    ids = processor.chat.tokenizer.encode("Oh, Hello 世界!", add_special_tokens=False).ids
    spread = [token for one in ids for token in (one, *[processor.chat.pad_id] * 40)]
    for tokens in (ids, spread):
        criterion = Stops(2, 2, [stop], processor.reply_text)
        ended = None
        for end in range(1, len(tokens) + 1):
            row = torch.tensor([5, 5, *tokens[:end]])
            other = torch.full_like(row, processor.chat.pad_id)
            found = criterion(torch.stack([row, other]), None)
            assert not found[1]
            ended = ended or (end if found[0] else None)
        first = next(
            end for end in range(1, len(tokens) + 1) if stop in processor.reply_text(tokens[:end])
        )
        assert ended == first
        assert criterion.ends == [first, None]


@pytest.fixture(scope="module")
def prompts(case, processor):
    return [processor.encode(row, GOLDEN / "images") for row in ROWS]


def test_replies_end_before_it_in_any_batch(shared_model, processor, prompts):
    """The stop starts within a token and ends within another."""
    whole = generate_replies(shared_model, processor, prompts, Sampling(16, no_repeat_ngram=0))
    text = processor.reply_text(whole[0].token_ids)
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    sampling = Sampling(16, no_repeat_ngram=0, stop=("never said", stop))
    together = generate_replies(shared_model, processor, prompts, sampling)
    alone = [generate_replies(shared_model, processor, [p], sampling)[0] for p in prompts]
    assert together == alone
    for found, before in zip(together, whole, strict=True):
        said = processor.reply_text(before.token_ids)
        if stop in said:
            assert found.text == said[: said.index(stop)].strip()
            assert found.finish == "stop"
            assert found.token_ids == before.token_ids[: len(found.token_ids)]
            assert stop in processor.reply_text(found.token_ids)
            assert stop not in processor.reply_text(found.token_ids[:-1])
        else:
            assert found == before
    assert together[0].finish == "stop"


class TestCommand:
    def infer(self, tmp_path, **settings):
        file = write_jsonl(tmp_path / "ask.jsonl", [{"query": "Hi."}])
        return vlft.infer(
            vlft.InferConfig(
                model=str(SIGLIP.folder), dataset=(str(file),), output=tmp_path / "answers.jsonl",
                max_new_tokens=8, show_samples=0, device="cpu", **settings,
            )
        )  # fmt: skip

    def test_results_say_it_once(self, tmp_path):
        (before,) = self.infer(tmp_path).rows
        header = tmp_path / "answers.settings.json"
        assert "stop" not in json.loads(header.read_text())["settings"]
        stop = before["response"][1:3]
        with pytest.raises(CheckpointError, match="made with other settings, stop None"):
            self.infer(tmp_path, stop=(stop,))
        for _ in range(2):
            (row,) = self.infer(tmp_path, stop=(stop, "a\\nb"), overwrite=True).rows
            assert (row["response"], row["finish"]) == (before["response"][:1], "stop")
            assert "stop" not in row
            assert json.loads(header.read_text())["settings"]["stop"] == [stop, "a\nb"]
        # The second time nothing is answered: the header is that of the file.
        assert self.infer(tmp_path, stop=(stop, "a\\nb")).rows == [row]

    def test_an_empty_one(self, tmp_path):
        with pytest.raises(ConfigError, match="--stop: found an empty text"):
            self.infer(tmp_path, stop=("",))


@pytest.mark.only_siglip
def test_a_chat_shows_nothing_of_it(shared_model, processor, monkeypatch):
    """Neither the text nor its start, which another token may complete."""
    whole = generate_replies(shared_model, processor, [processor.encode({"query": "Hi."})],
                             Sampling(8))[0].text  # fmt: skip
    stop, shown = whole[3:6], []
    buffer = io.StringIO()
    monkeypatch.setattr(buffer, "write", lambda text: shown.append(text))
    monkeypatch.setattr(out, "_file", buffer)
    sampling = dataclasses.replace(Sampling(8), stop=(stop,))
    chat(shared_model, processor, sampling, system=None, lines=io.StringIO("Hi.\n"))
    assert "".join(shown) == whole[: whole.index(stop)].strip().replace("\n", "\\n") + "\n"
