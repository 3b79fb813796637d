"""Unlimited-OCR: replies attend through a window, in packed rows as in transformers' decoding."""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, OCR, write_jsonl
from tolerances import assert_close
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoTokenizer

import vlft
from vlft.checkpoints.export import export_model
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.merge import merge_lora
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.runs import find_checkpoint
from vlft.data.encode import EncodedSample
from vlft.data.outline import outline
from vlft.errors import CheckpointError, DataError
from vlft.families.image_settings import ImageSettings
from vlft.families.registry import family_of
from vlft.inference.generate import Sampling, generate_replies
from vlft.inference.replier import Replier
from vlft.models.tree_attention import fused_attention, tree_attention
from vlft.packing import attention
from vlft.packing.attention import additive_mask, block_mask, row_attention, tree_mask
from vlft.packing.packer import Packer
from vlft.packing.prefix_tree import pack
from vlft.training.loss import PackedLoss, source_states
from vlft.vision.encode import pixels_of

CPU = Placement(torch.device("cpu"), torch.float32)
IMAGE = 99


def sample(prompt: str, reply: str, window: int) -> EncodedSample:
    """A sample of a token per letter, whose reply is trained."""
    ids = torch.tensor([ord(c) - ord("a") for c in prompt + reply])
    labels = ids.clone()
    labels[: len(prompt)] = -100
    return EncodedSample(ids, labels, prompt + reply, (), window=window)


def some_samples(seed: int, window: int) -> list[EncodedSample]:
    """Shared prompts and shared beginnings of replies; some replies of many windows."""
    draw = random.Random(seed)
    prompts = ["".join(draw.choices("ab", k=draw.randint(1, 150))) for _ in range(3)]
    starts = ["".join(draw.choices("cd", k=draw.randint(0, 40))) for _ in range(2)]
    return [
        sample(
            draw.choice(prompts),
            draw.choice(starts) + "".join(draw.choices("efgh", k=draw.choice((1, 5, 30, 200)))),
            window,
        )
        for _ in range(9)
    ]


class TestRow:
    @pytest.mark.parametrize("window", [1, 7, 64])
    def test_the_rule_on_each_path(self, window):
        samples = some_samples(0, window)
        row = pack(samples, IMAGE)
        assert row.window is not None
        mask = tree_mask(row.exit, row.window)[0, 0]
        plain = tree_mask(row.exit)[0, 0]
        found = set()
        for last in range(len(row)):
            path = plain[last].nonzero().squeeze(1)
            text = row.input_ids[0, path].tolist()
            for item in samples:
                if item.input_ids.tolist() != text:
                    continue
                found.add(item.text)
                place = torch.arange(len(path))
                query, key = place.unsqueeze(1), place.unsqueeze(0)
                near = (key < item.prompt_tokens) | (query - key < window)
                assert torch.equal(mask[path][:, path], (key <= query) & near)
        assert found == {item.text for item in samples}

    def test_without_a_window_there_is_none(self):
        assert pack([replace(s, window=None) for s in some_samples(0, 1)], IMAGE).window is None

    def test_a_reply_is_not_shared_with_a_prompt(self):
        """Its tokens are seen by all of the prompt's replies, but in the reply by a few."""
        samples = [sample("ab", "cdef", 2), sample("abcd", "ef", 2), sample("ab", "cdgh", 2)]
        row = pack(samples, IMAGE)
        assert len(row) == 2 + 4 + 2 + 4
        (plan,) = Packer(IMAGE, 10**6, 10**6).plan([outline(item, IMAGE) for item in samples])
        assert plan.tokens == len(row)

    @pytest.mark.parametrize("window", [1, 7, 64, 10_000])
    @pytest.mark.parametrize("fused", [False, True])
    def test_by_segments_as_with_the_dense_mask(self, monkeypatch, window, fused):
        monkeypatch.setattr(attention, "WINDOWED_QUERIES", 48)
        torch.manual_seed(0)
        row = pack(some_samples(window, window), IMAGE)
        inputs = [torch.randn(1, 4, len(row), 8, requires_grad=True) for _ in range(3)]
        plain = scaled_dot_product_attention(*inputs, attn_mask=tree_mask(row.exit, row.window))
        blocks = row_attention(row.segments, row.exit, torch.float32, row.window, fused=fused)
        if fused:
            found = fused_attention(blocks, *inputs, scaling=8**-0.5)
        else:
            found, _ = tree_attention(torch.nn.Module(), *inputs, None, row=blocks)
        assert_close(found.transpose(1, 2), plain, "layer")
        weights = torch.randn_like(plain)
        expected = torch.autograd.grad((plain * weights).sum(), inputs)
        gradients = torch.autograd.grad((found.transpose(1, 2) * weights).sum(), inputs)
        assert_close(gradients, expected, "layer gradients")

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_long_reply_needs_scores_of_its_prompt_and_window_alone(self, fused):
        row = pack([sample("a" * 50, "b" * 4000, 16)], IMAGE)
        blocks = row_attention(row.segments, row.exit, torch.float32, row.window, fused=fused)
        most = attention.WINDOWED_QUERIES if fused else attention.QUERIES[torch.float32]
        for block in blocks[2:]:
            assert sum(end - first for first, end in block.ranges) <= 50 + 16 + most

    @pytest.mark.parametrize("window", [7, 300])
    @pytest.mark.parametrize("padding", [0, 300])
    def test_flex_attention_sees_the_same(self, window, padding):
        row = pack(some_samples(1, window), IMAGE)
        query, key, value = inputs = [torch.randn(1, 2, len(row), 16) for _ in range(3)]
        mask = additive_mask(row.exit, torch.float32, row.window)
        plain = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            padded = [torch.nn.functional.pad(part, (0, 0, 0, padding)) for part in inputs]
            seen = block_mask(row.exit, row.window, len(row) + padding)
            found = flex_attention(*padded, block_mask=seen)
        assert found.isfinite().all()
        assert_close(found[:, :, : len(row)], plain, "layer")


def make_folder(path, window: int, **fields):
    """DeepSeek-OCR's golden checkpoint under the configuration of Unlimited-OCR."""
    shutil.copytree(OCR.folder, path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    config |= {
        "architectures": ["UnlimitedOCRForCausalLM"],
        "model_type": "unlimited-ocr",
        "sliding_window_size": window,
        **fields,
    }
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return describe(make_folder(tmp_path_factory.mktemp("unlimited") / "model", 8))


@pytest.fixture(scope="module")
def processor(folder):
    return ImageSettings(image_mode="tiny").apply(folder.processor())


@pytest.fixture(scope="module")
def model(folder):
    torch.manual_seed(0)
    return load_model(folder, CPU)


QUERY = "<image>\nFree OCR."
PAGES = ("chart.png", "photo_a.jpg")


def rows():
    """Replies of several windows, two of which begin alike, on two pages; one without a page."""
    text = "one two three four five six seven eight nine ten "
    return [
        {"query": QUERY, "images": [PAGES[0]], "response": text},
        {"query": QUERY, "images": [PAGES[0]], "response": text[:20] + text[5:]},
        {"query": QUERY, "images": [PAGES[1]], "response": text[4:]},
        {"query": "Say it.", "response": text},
    ]


def both_pages():
    """A record of both pages in one prompt."""
    return {**rows()[2], "query": "<image><image>Multi page parsing.", "images": list(PAGES)}


class TestAgainstDecoding:
    """transformers' own: the prompt, then one token at a time with its cache."""

    @pytest.mark.parametrize("window", [8, 128])
    def test_logits_of_every_reply_position(self, folder, processor, window):
        config = {**folder.config, "sliding_window_size": window}
        model = load_model(replace(folder, config=config), CPU)
        assert model.config.text_config.sliding_window == window
        chat = replace(processor.chat, window=window)
        records = [*rows(), both_pages()]
        if window == 128:
            records = [{**records[0], "response": records[0]["response"] * 11}]
        samples = [replace(processor, chat=chat).encode(r, GOLDEN / "images") for r in records]
        assert all(len(item) - item.prompt_tokens > 2 * window for item in samples)
        row = pack(samples, processor.chat.image_token_id)
        assert len(row) < sum(map(len, samples)) or len(samples) == 1
        with torch.inference_mode():
            logits = dict(
                zip(row.source.tolist(), packed_logits(model, folder, row, processor), strict=True)
            )
            paths = tree_mask(row.exit)[0, 0]
            for item in samples:
                ends = [
                    path.tolist()
                    for path in (paths[last].nonzero().squeeze(1) for last in range(len(row)))
                    if torch.equal(row.input_ids[0, path], item.input_ids)
                ]
                (path,) = ends
                packed = torch.stack([logits[i] for i in path[item.prompt_tokens - 1 : -1]])
                difference = (packed - decode(model, processor, item)).abs().max()
                assert difference < 1e-4

    def test_full_attention_is_not_the_same(self, folder, model, processor):
        """The comparison above can fail."""
        item = processor.encode(rows()[0], GOLDEN / "images")
        row = pack([replace(item, window=None)], processor.chat.image_token_id)
        with torch.inference_mode():
            difference = packed_logits(model, folder, row, processor)
            difference -= decode(model, processor, item)
        assert difference.abs().max() > 1e-2

    def test_infer_decodes_with_that_cache(self, model, processor, monkeypatch):
        """Greedy replies are the tokens that decoding one at a time finds likeliest, in a batch."""
        prompts = [
            processor.encode({k: v for k, v in r.items() if k != "response"}, GOLDEN / "images")
            for r in rows()[1:]
        ]
        assert len({len(prompt) for prompt in prompts}) == 2
        sampling = Sampling(max_new_tokens=24, no_repeat_ngram=0)
        replies = generate_replies(model, processor, prompts, sampling)
        for prompt, reply in zip(prompts, replies, strict=True):
            assert likeliest(model, processor, prompt, reply) == reply.token_ids
            assert len(reply.token_ids) > 16
        # Once this fails, prompts of all lengths can be one batch again.
        monkeypatch.setattr(Replier, "_alike", lambda _self, _prompts, batch: [batch])
        *_, padded = generate_replies(model, processor, prompts, sampling)
        assert likeliest(model, processor, prompts[-1], padded) != padded.token_ids


def packed_logits(model, folder, row, processor):
    """(S, V) logits of a packed row at its sources."""
    PackedLoss(model, folder.family)  # prepares the model for rows
    return model.lm_head(source_states(model, folder.family, row, pixels_of(row.images, processor)))


def likeliest(model, processor, prompt, reply):
    """The likeliest token after each of the reply's tokens, by decoding one at a time."""
    ids = torch.cat([prompt.input_ids, torch.tensor(reply.token_ids)])
    labels = torch.full_like(ids, -100)
    labels[len(prompt) :] = ids[len(prompt) :]
    made = decode(model, processor, replace(prompt, input_ids=ids, labels=labels))
    return made.argmax(-1).tolist()


def decode(model, processor, item):
    """(R, V) logits that predict the reply's tokens: the prompt, then one token at a time."""
    start = item.prompt_tokens
    prompt = replace(item, input_ids=item.input_ids[:start], labels=item.labels[:start])
    inputs = processor.collate([prompt])
    del inputs["labels"]
    with torch.inference_mode():
        output = model(**inputs, use_cache=True)
        found = [output.logits[0, -1]]
        for token in item.input_ids[start:-1]:
            output = model(input_ids=token.view(1, 1), cache=output.cache, use_cache=True)
            found.append(output.logits[0, -1])
    kept = output.cache.layers[0]
    assert type(kept).__name__ == "UnlimitedOcrDynamicReferenceSlidingWindowLayer"
    return torch.stack(found)


class TestSeveralPages:
    def test_each_page_is_whole_in_every_mode(self, folder):
        """As transformers' class for ``crop_to_patches=False``, which the authors ask for."""
        for mode, side in (("gundam", 16), ("base", 16), ("tiny", 8)):
            processor = ImageSettings(image_mode=mode).apply(folder.processor())
            sample = processor.encode(both_pages(), GOLDEN / "images")
            tokens = side * (side + 1) + 1
            assert [image.tokens for image in sample.images] == [tokens] * 2
            chat, start = processor.chat, 1 + 2 * tokens
            is_image = sample.input_ids == chat.image_token_id
            assert is_image.nonzero().squeeze(1).tolist() == list(range(1, start))
            text = chat.tokenizer.encode("Multi page parsing.", add_special_tokens=False).ids
            assert sample.input_ids[start : start + len(text)].tolist() == text
        large, view = (2000, 1000), folder.processor().pixels.view
        assert view(large, 2) == (273, (0, 0))
        assert view(large, 1)[1] != (0, 0)

    def test_features_are_those_of_each_page(self, folder, model, processor):
        """What the model's class makes of both in one prompt is what it makes of each alone."""
        images = processor.encode(both_pages(), GOLDEN / "images").images
        with torch.inference_mode():
            found = [
                model.get_image_features(**processor.image_inputs(some)).pooler_output
                for some in (images, images[:1], images[1:])
            ]
        both, *each = (torch.cat(list(features)) for features in found)
        assert len(both) == sum(image.tokens for image in images)
        assert_close(both, torch.cat(each), "layer")

    def test_a_chat_template_takes_them(self, folder, model, tmp_path):
        export_model(model, folder, tmp_path, layout="transformers", dtype=None)
        stock = AutoTokenizer.from_pretrained(tmp_path)
        parts = [{"type": "image"}] * 2 + [{"type": "text", "text": "Multi page parsing."}]
        text = stock.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        assert text == f"{stock.bos_token}<image><image>Multi page parsing."

    def test_several_turns_are_refused(self, processor):
        row = {**both_pages(), "history": [["a", "b"]]}
        with pytest.raises(DataError, match="2 turns; the model was trained on one"):
            processor.encode(row, GOLDEN / "images")


class TestFolder:
    def test_which_family(self, folder, model, tmp_path):
        assert (folder.family.name, folder.layout) == ("unlimited_ocr", "original")
        assert family_of(model) is folder.family
        assert family_of(load_model(describe(OCR.folder), CPU)).name == "deepseek_ocr"
        hyphen = make_folder(tmp_path / "a", 8, model_type="unlimited_ocr")
        assert describe(hyphen).layout == "original"
        only = make_folder(tmp_path / "b", 8, model_type="deepseek_vl_v2", architectures=[])
        assert describe(only).family.name == "unlimited_ocr"
        silent = make_folder(tmp_path / "c", None)
        assert describe(silent).native_config()["text_config"]["sliding_window"] == 128

    def test_through_transformers_layout_and_back(self, folder, model, tmp_path):
        previous = folder
        for number, layout in enumerate(("transformers", "original")):
            target = tmp_path / str(number)
            target.mkdir()
            export_model(load_model(previous, CPU), previous, target, layout=layout, dtype=None)
            previous = describe(target)
            assert (previous.family.name, previous.layout) == ("unlimited_ocr", layout)
            assert previous.processor().chat.window == 8
            assert previous.native_config() == folder.native_config()
            assert previous.weights_digest == folder.weights_digest
        written = previous.config
        assert written["architectures"] == ["UnlimitedOCRForCausalLM"]
        assert written["model_type"] == "unlimited-ocr"
        assert written["sliding_window"] == written["language_config"]["sliding_window_size"] == 8

    def test_defaults_are_the_authors(self, folder):
        sampling = Sampling().resolved(folder.family)
        found = (sampling.max_new_tokens, sampling.no_repeat_ngram, sampling.ngram_window)
        assert found == (32768, 35, 128)
        assert folder.processor().chat.ngram_exempt == ()

    def test_layers_of_both_kinds_are_refused(self, folder, tmp_path):
        config = {"model_type": "unlimited_ocr", **folder.native_config()}
        config["text_config"]["layer_types"][0] = "full_attention"
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        message = "layer_types full_attention, reference_sliding_attention"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            describe(tmp_path)


def test_tuned_merged_and_answered(folder, tmp_path):
    """The commands, on replies of two windows; the merged model reads as base and adapter do."""
    data = write_jsonl(tmp_path / "data.jsonl", rows())
    result = vlft.sft(
        vlft.SftConfig(
            model=str(folder.path), dataset=(str(data),), image_root=GOLDEN / "images",
            image_mode="tiny", val_ratio=0.0, output_dir=tmp_path, max_steps=2, batch_size=4,
            learning_rate=1e-2, lora_target_modules="ALL", show_sample=False, device="cpu",
        )
    )  # fmt: skip
    merged = merge_lora(vlft.MergeLoraConfig(ckpt_dir=result.run, output_dir=tmp_path / "merged"))
    asked = [{"query": QUERY, "images": [str(GOLDEN / "images" / PAGES[0])]}]
    texts = []
    for path, adapter in ((folder.path, find_checkpoint(result.run)), (merged.folder, None)):
        loaded = vlft.load(path, adapter, image_mode="tiny", dtype="float32", device="cpu")
        texts.append(vlft.generate(*loaded, asked, 20)[0].token_ids)
    assert describe(merged.folder).family is folder.family
    assert texts[0] == texts[1]
