"""Special tokens that data writes are plain text, unless the user keeps them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from conftest import MATRIX, SIGLIP, VL2_NOAUX, write_jsonl
from tokenizers import AddedToken, Tokenizer

import vlft
from vlft.checkpoints.locate import describe
from vlft.checkpoints.runs import read_run_config
from vlft.config import InferConfig, PlanConfig, SftConfig
from vlft.data.dataset import load_train_and_val
from vlft.data.options import DataOptions, Reading
from vlft.data.special_tokens import CONTENT, SpecialTokens, any_of
from vlft.families.registry import FAMILIES
from vlft.planning.estimate import plan_data
from vlft.settings import build
from vlft.training.setup import check_settings

LETTERS = Path(__file__).parent / "tokenizers" / "added_letters.json"
TOKENIZERS = [*(case.folder / "tokenizer.json" for case in MATRIX), LETTERS]
EOS, USER = "<｜end▁of▁sentence｜>", "<|User|>"
every_family = pytest.mark.parametrize("case", MATRIX, ids=str, indirect=True, scope="session")


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def row_with(text: str, case) -> dict:
    """A record with the text in every field that the family supports."""
    if case.image_mode:
        return {"query": f"a {text} b", "response": f"c {text} d"}
    return {
        "system": f"s {text}", "history": [[f"q{text}", f"{text}r"]], "query": f"a {text} b",
        "response": f"c {text} d",
    }  # fmt: skip


@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.parent.name)
def test_ids_are_those_of_the_whole_text(path):
    """Without stand-ins, cutting at the added tokens and leaving them out changes no id."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([AddedToken(USER, special=True)])
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    plain = [
        "Köln", " ", "  ", "\n", "\n\n", "12345", "猫", "a.b", "<", ">", "｜", "|>", "<|Us", "ü",
        "🎉", "word ", " word", "é", "end", "\t", "<td", "'s",
    ]  # fmt: skip
    special, draw = SpecialTokens(tokenizer), random.Random(11)
    for _ in range(300):
        text = "".join(draw.choices([*plain, *added], k=draw.randint(0, 12)))
        whole = tokenizer.encode(text, add_special_tokens=False)
        assert special.tokenize(text) == (whole.ids, whole.offsets), text


@every_family
class TestEveryFamily:
    def test_no_turn_is_forged(self, case, processor):
        """As many special tokens as with other text in their place, and the very same text."""
        chat, plain = processor.chat, processor.encode(row_with("@@", case))
        texts = sorted(chat.special.guarded - {chat.image_tag, "<image>"})
        ids = {chat.tokenizer.token_to_id(text) for text in texts}
        before = plain.input_ids.tolist()
        assert EOS in texts
        for text in texts:
            row = row_with(text, case)
            sample = processor.encode(row)
            found = sample.input_ids.tolist()
            assert [t for t in found if t in ids] == [t for t in before if t in ids], text
            assert processor.text(found) == processor.text(before).replace("@@", text)
            assert sample.text == plain.text.replace("@@", text)
            assert len(sample.labels) == len(found)
            count = json.dumps(row, ensure_ascii=False).count(text)
            assert sample.as_text == (text,) * count

    def test_kept_they_are_tokens(self, case, processor):
        kept = processor.with_special_tokens("keep")
        row = row_with(EOS, case)
        sample = kept.encode(row)
        ends, as_text = (
            one.encode(row).input_ids.tolist().count(processor.chat.eos_id)
            for one in (kept, processor)
        )
        assert ends == as_text + json.dumps(row, ensure_ascii=False).count(EOS)
        assert sample.as_text == ()

    def test_trained_tokens_are_the_reply(self, case, processor):
        sample = processor.encode({"query": "Hi.", "response": f"a{EOS}{USER}: b"})
        trained = [token for token in sample.labels.tolist() if token >= 0]
        assert processor.text(trained).strip() == f"a{EOS}{USER}: b{EOS}"
        assert trained.count(processor.chat.eos_id) == 1

    def test_ordinary_text_is_not_touched(self, case, processor, monkeypatch):
        monkeypatch.setattr(SpecialTokens, "tokenize", None)
        for text in ("", "<", "a <b> c", "<|", "｜>", "Köln <td>1</td> <|ref|>x<|/ref|>"):
            row = row_with(text, case)
            one, other = processor.encode(row), processor.with_special_tokens("keep").encode(row)
            assert one.input_ids.equal(other.input_ids)
            assert one.labels.equal(other.labels)
            assert one.as_text == ()

    def test_tags_of_grounding_and_tables_stay(self, case, processor):
        known = {text for text in CONTENT if processor.chat.tokenizer.token_to_id(text) is not None}
        row = row_with(EOS + "".join(sorted(known)), case)
        ids = processor.encode(row).input_ids.tolist()
        for text in known:
            assert processor.chat.tokenizer.token_to_id(text) in ids
        if case.family.startswith(("deepseek_vl2", "deepseek_ocr")):
            assert {"<|ref|>", "<|/det|>", "<|grounding|>"} <= known


def test_added_letters_stay_tokens():
    special = SpecialTokens(Tokenizer.from_file(str(LETTERS)))
    assert "ü" not in special.guarded
    assert "<｜place▁holder｜>" in special.guarded
    letter = special._tokenizer.token_to_id("ü")
    text = "ü<｜place▁holder｜>ü"
    ids, offsets = special.tokenize(special._masked(text))
    assert ids[0] == ids[-1] == letter
    assert letter not in ids[1:-1]
    assert offsets[-1] == (len(text) - 1, len(text))


def test_tokens_that_overlap():
    """Breaking one must not leave the other."""
    tokenizer = Tokenizer.from_file(str(SIGLIP.folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<a|", special=True), AddedToken("|b>", special=True)])
    tokenizer.add_special_tokens([AddedToken("⁂", special=True)])
    special = SpecialTokens(tokenizer)
    guarded = {tokenizer.token_to_id(text) for text in special.guarded}
    for text in ("<a|b>", "<a|<a|b>", "⁂⁂", "|b><a|"):
        ids, _ = special.tokenize(special._masked(text))
        assert not guarded & set(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("texts", "text", "found"),
    [
        (["ab", "abc", "a"], "abcaba", ["abc", "ab", "a"]),
        (["a", "ab"], "ab", ["ab"]),
        (["(", "(?"], "(?(", ["(?", "("]),
        ([], "abc", []),
    ],
)
def test_the_longest_is_found(texts, text, found):
    assert any_of(texts).findall(text) == found


class TestCommands:
    def train(self, rows, val=(), **settings):
        write_jsonl(Path("t.jsonl"), rows)
        given = {"model": str(SIGLIP.folder), "dataset": ["t.jsonl"], "val_ratio": 0, **settings}
        if val:
            write_jsonl(Path("v.jsonl"), val)
            given["val_dataset"] = ["v.jsonl"]
        return build(SftConfig, given)

    def test_one_warning_counts_them(self, capsys):
        processor = describe(SIGLIP.folder).processor()
        write_jsonl(
            Path("t.jsonl"),
            [{"query": "a", "response": "b"}, {"query": f"{EOS}{EOS}", "response": EOS}],
        )
        write_jsonl(Path("v.jsonl"), [{"query": f"a{EOS}", "response": "b"}])
        options = DataOptions(Reading(processor.family.image_tag))
        for special_tokens in ("text", "keep"):
            encoder = processor.with_special_tokens(special_tokens).encoder
            train, _ = load_train_and_val(["t.jsonl"], ["v.jsonl"], 0, encoder, options)
            said = capsys.readouterr().err.replace("\n", " ")
            warning = f"4 special tokens in texts, read as plain text (the first: {EOS} in t.jsonl"
            assert said.count(warning) == (special_tokens == "text")
            assert said.count("special") == (2 if special_tokens == "text" else 0)
        assert len(train) == 2

    def test_a_run_keeps_its_setting(self, capsys, tmp_path):
        config = self.train([{"query": EOS, "response": "b"}] * 2, special_tokens="keep")
        assert check_settings(config, None).processor.chat.special is None
        result = vlft.sft(self.train([{"query": EOS, "response": "b"}] * 2, max_steps=1))
        assert read_run_config(result.run).special_tokens == "text"
        assert capsys.readouterr().err.count("special tokens in texts") == 1
        with pytest.raises(vlft.VlftError, match="--special-tokens: found 'keep', the run has"):
            vlft.sft(SftConfig(resume=result.run, special_tokens="keep"), {"special_tokens"})
        # Older releases had no such setting, and kept them.
        for path in (result.run / "run_config.json", result.checkpoint / "run_config.json"):
            saved = json.loads(path.read_text())
            del saved["special_tokens"]
            path.write_text(json.dumps(saved))
        write_jsonl(Path("q.jsonl"), [{"query": EOS}])
        answer = {"ckpt_dir": result.checkpoint, "dataset": ("q.jsonl",), "max_new_tokens": 1}
        for given, is_text in (({}, False), ({"special_tokens": "text"}, True)):
            output = tmp_path / f"{is_text}.jsonl"
            vlft.infer(InferConfig(**answer, **given, output=output, show_samples=0))
            assert ("1 special token in texts" in capsys.readouterr().err) == is_text

    def test_a_plan_counts_as_the_run_does(self):
        lengths = []
        for special_tokens in ("text", "keep"):
            given = self.train([{"query": EOS, "response": "b"}] * 2)
            config = PlanConfig(
                model=given.model, dataset=given.dataset, special_tokens=special_tokens
            )
            lengths.append(plan_data(config, describe(SIGLIP.folder)).longest_sample)
        assert lengths[0] > lengths[1]

    def test_a_result_file_is_continued_with_its_setting(self, tmp_path):
        write_jsonl(Path("q.jsonl"), [{"query": f"a{EOS}"}])
        given = {"model": str(SIGLIP.folder), "dataset": ("q.jsonl",), "max_new_tokens": 1}
        given |= {"output": tmp_path / "o.jsonl", "show_samples": 0}
        vlft.infer(InferConfig(**given))
        with pytest.raises(vlft.VlftError, match="made with other settings, special_tokens text"):
            vlft.infer(InferConfig(**given, special_tokens="keep"))
        assert vlft.infer(InferConfig(**given)).count == 1

    def test_from_python(self, capsys):
        model, processor = vlft.load(SIGLIP.folder, device="cpu")
        vlft.generate(model, processor, [{"query": EOS}, {"query": f"b{EOS}"}], 1)
        assert capsys.readouterr().err.count("2 special tokens in texts") == 1
        _, kept = vlft.load(SIGLIP.folder, device="cpu", special_tokens="keep")
        assert kept.encode({"query": EOS}).as_text == ()


def test_every_family_has_control_tokens_to_guard():
    names = {describe(case.folder).family.name for case in MATRIX}
    # Unlimited-OCR has DeepSeek-OCR's tokenizer and processor.
    assert names | {"unlimited_ocr"} == {family.name for family in FAMILIES}
    guarded = describe(VL2_NOAUX.folder).processor().chat.special.guarded
    assert {USER, "<|Assistant|>", EOS, "<image>"} <= guarded
    assert not guarded & CONTENT


def test_a_chat_warns_once(monkeypatch, capsys):
    """What a reply holds is text of the next prompt."""
    from vlft.inference import chat as chats
    from vlft.inference.generate import Sampling
    from vlft.inference.replier import Reply

    processor, prompts = describe(VL2_NOAUX.folder).processor(), []

    def reply(_model, _processor, given, *_):
        prompts.extend(given)
        return [Reply(f"a{USER}: b", [], "stop")]

    monkeypatch.setattr(chats, "generate_replies", reply)
    lines = io.StringIO(f"Hi.\n{EOS}\nSo?\n")
    chats.chat(None, processor, Sampling(3), system=f"s{EOS}", lines=lines)
    assert [prompt.as_text for prompt in prompts] == [
        (EOS,), (EOS, USER, EOS), (EOS, USER, EOS, USER)
    ]  # fmt: skip
    assert capsys.readouterr().err.count("special token") == 1
    user = processor.chat.tokenizer.token_to_id(USER)
    assert [p.input_ids.tolist().count(user) for p in prompts] == [1, 2, 3]


def test_a_check_counts_them(capsys):
    from vlft.cli.check import run_check
    from vlft.config import CheckConfig

    write_jsonl(Path("t.jsonl"), [{"query": EOS, "response": f"b{EOS}"}])
    run_check(CheckConfig(dataset=("t.jsonl",), model=str(SIGLIP.folder)))
    assert "special as text 2" in capsys.readouterr().out
