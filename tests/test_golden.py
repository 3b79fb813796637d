"""The authors' numbers: text, ids, pixels, features, logits, greedy tokens, loss, gradients."""

from __future__ import annotations

import fnmatch
import hashlib
import json

import pytest
import torch
from conftest import GOLDEN, MATRIX
from safetensors.torch import load_file as load_tensors
from tolerances import assert_close

from vlft.checkpoints.export import canonical_name
from vlft.data.encode import tokenize
from vlft.data.images import inspect_image
from vlft.errors import DataError
from vlft.families import ocr
from vlft.families.image_settings import ImageSettings
from vlft.inference.generate import Sampling, generate_replies
from vlft.packing.prefix_tree import pack
from vlft.training.loss import PackedLoss
from vlft.vision.encode import pixels_of

# The authors name a mode of DeepSeek-OCR by the height of its view.
HEIGHTS = {
    "deepseek_ocr": {512: "tiny", 640: "small", 1024: "base", 1280: "large"},
    "deepseek_ocr2": {768: "small", 1024: "base"},
}


def load_file(path) -> dict[str, torch.Tensor]:
    """The tensors of a case, copied in parts: ids in 32 bits, every fourth logit."""
    return {k: t.long() if t.dtype == torch.int32 else t for k, t in load_tensors(path).items()}


def in_mode(folder, mode: dict | None):
    """The processor of a checkpoint, in the image mode of a case; gundam cuts tiles."""
    if folder.family.name not in HEIGHTS:
        return folder.processor()
    heights = HEIGHTS[folder.family.name]
    cut = mode is None or mode["crop_mode"]
    name = "gundam" if cut else heights[mode["image_size"]]
    return ImageSettings(image_mode=name).apply(folder.processor())


def cases_of(kind: str) -> list:
    found = []
    for row in MATRIX:
        for path in sorted(row.cases.glob("*.json")):
            if not path.name.startswith("_") and json.loads(path.read_text())["kind"] == kind:
                found.append(pytest.param(row, path, id=f"{row.checkpoint}-{path.stem}"))
    return found


def row_of(messages: list[dict], data: dict) -> dict:
    """A conversation of the authors' processor as a row of the native layout."""
    system = data.get("system_prompt")
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    texts = [message["content"] for message in messages]
    row = {
        "query": texts[-2],
        "history": [[texts[i], texts[i + 1]] for i in range(0, len(texts) - 2, 2)],
        "images": [image for message in messages for image in message.get("images", [])],
        "system": system,
    }
    return {**row, "response": texts[-1]} if texts[-1] else row


def official_text(data: dict) -> str:
    """The expected chat text, with the family's own roles and a single system prompt."""
    text = data["sft_format"]
    if data["conversation"][0]["role"] == "user":
        text = text.replace("user:", "<|User|>:").replace("assistant:", "<|Assistant|>:")
    if data["conversation"][0]["role"] == "system":
        # The case has the system prompt twice, once as a message, which shifts the separators.
        text = text.replace("system: You are a terse assistant.\n\n", "")
        text = text.replace("<｜end▁of▁sentence｜><|Assistant|>:", "\n\n<|Assistant|>:")
    return text


def stored_pixels(data: dict) -> list[str]:
    """The checksums of the views of each size."""
    names = ("pixel_values_sha256", "pixel_crops_sha256")
    return [data[name] for name in names if name in data]


def rows_of(found: torch.Tensor, expected: dict, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor and its stored value as rows; of large tensors only some rows are stored."""
    if name in expected:
        return found.flatten(0, -2), expected[name].flatten(0, -2)
    return found.flatten(0, -2)[expected[f"{name}.row_idx"]], expected[f"{name}.rows"]


@pytest.mark.parametrize(("case", "path"), cases_of("single"), indirect=["case"], scope="session")
class TestSingle:
    @pytest.fixture
    def data(self, path):
        return json.loads(path.read_text("utf-8"))

    @pytest.fixture
    def expected(self, path):
        return load_file(path.with_suffix(".safetensors"))

    @pytest.fixture
    def processor(self, data, folder):
        return in_mode(folder, data.get("mode"))

    @pytest.fixture
    def sample(self, data, processor):
        return processor.encode(row_of(data["conversation"], data), GOLDEN)

    def test_text_and_ids(self, case, data, expected, sample, processor):
        assert sample.text == official_text(data)
        assert torch.equal(sample.input_ids, expected["input_ids"][0])
        mask = (sample.input_ids == processor.chat.image_token_id).to(torch.uint8)
        assert torch.equal(mask, expected["images_seq_mask"][0])
        if "labels_mask_prompt_true" in expected:
            # The authors label the BOS token too, which has no effect on the loss.
            labels = expected["labels_mask_prompt_true"][0]
            assert torch.equal(sample.labels[1:], labels[1:])
        else:
            replies = [m for m in data["conversation"] if m["role"] == case.roles[1]]
            trained = any(message["content"] for message in replies)
            assert bool((sample.labels != -100).any()) == trained

    def test_pixels(self, data, expected, sample, processor):
        if not sample.images:
            pytest.skip("text only")
        by_size = zip(*processor.pixel_values(sample.images), strict=True)
        views = [torch.cat(of_size) for of_size in by_size]
        assert {pixels.dtype for pixels in views} == {torch.float32}
        digests = [hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for v in views]
        assert digests == stored_pixels(data)

    def test_features(self, case, expected, sample, processor, shared_model):
        if not sample.images:
            pytest.skip("text only")
        if case.family in HEIGHTS:
            pytest.skip("see test_page_features")
        inputs = processor.image_inputs(sample.images)
        with torch.no_grad():
            features = processor.family.vision_features(shared_model, inputs)
            if case.family == "deepseek_vl2":  # stored without newlines and separators
                features = shared_model.model.projector(features)
            else:
                features = processor.family.align(shared_model, features, [(0, 0)])
        found, wanted = rows_of(features, expected, "image_embeds")
        assert_close(found, wanted, "golden features")

    def test_page_features(self, case, data, expected, sample, processor, shared_model):
        """Of the towers, and what replaces the image tokens, newlines and separator included."""
        if case.family not in HEIGHTS or "inputs_embeds.rows" not in expected:
            pytest.skip("not stored")
        inputs, tiles = processor.image_inputs(sample.images), [sample.images[0].tiles]
        with torch.no_grad():
            features = ocr.vision_features(shared_model, inputs)
            aligned = processor.family.align(shared_model, features, tiles)
        left, right = "vision_features.left", "vision_features.right"
        width = expected[f"{left}.rows"].shape[1]
        found, wanted = rows_of(features[:, :width], expected, left)
        assert_close(found, wanted, "golden features")
        if f"{right}.rows" in expected:
            assert_close(*rows_of(features[:, width:], expected, right), "golden features")
        whole = torch.zeros(len(sample), aligned.shape[1])
        whole[sample.input_ids == processor.chat.image_token_id] = aligned
        assert_close(*rows_of(whole, expected, "inputs_embeds"), "golden features")

    def test_logits(self, case, expected, sample, processor, shared_model):
        if "logits_last4" not in expected:
            pytest.skip("not stored")
        inputs = processor.collate([sample])
        del inputs["labels"]
        with torch.no_grad():
            logits = shared_model(**inputs).logits
        assert_close(logits[:, -4:, ::4], expected["logits_last4"], "golden logits")
        assert torch.equal(logits.argmax(-1), expected["argmax_all"])

    def test_greedy(self, data, expected, sample, processor, shared_model):
        if "logits_last4" not in expected:
            pytest.skip("see other cases")
        # The authors' 12 tokens go on after an end-of-sentence token.
        reply = generate_replies(shared_model, processor, [sample], Sampling(12))[0]
        assert reply.token_ids == data["generated_ids"][: len(reply.token_ids)]
        assert len(reply.token_ids) == 12 or reply.token_ids[-1] == processor.chat.eos_id
        if len(reply.token_ids) == 12:
            # Where the authors' decoder has U+FFFD for an added letter, vlft has the letter.
            letters = str.maketrans(dict.fromkeys("øöúÿ", "\ufffd"))
            expected_text = data["generated_text"].strip()
            assert reply.text.translate(letters) == expected_text.translate(letters)


@pytest.mark.parametrize(("case", "path"), cases_of("tokens_only"), indirect=["case"])
def test_prompt_ids(case, path, processor):
    """A prompt given as one text gets the authors' ids."""
    data = json.loads(path.read_text("utf-8"))
    if case.family in HEIGHTS:
        pytest.skip("see test_page_prompts")
    expected = load_file(path.with_suffix(".safetensors"))["input_ids"][0]
    chat = processor.chat
    before, after = chat.image_border
    sizes = [inspect_image(GOLDEN / file).size for file in data["image_files"]]
    runs = iter([chat.view(size, len(sizes))[0] for size in sizes])
    ids = [chat.bos_id]
    for token in tokenize(data["sft_format"], chat)[0]:
        image = token == chat.image_token_id
        ids += [*before, *[token] * next(runs), *after] if image else [token]
    assert ids == expected.tolist()


@pytest.mark.parametrize(("case", "path"), cases_of("tokens_only"), indirect=["case"])
def test_page_prompts(case, path, folder):
    """The authors' ids, except where a prompt has another number of tags than of images.

    Theirs then writes text twice, or drops some; vlft puts the image first, or says what is wrong.
    """
    data = json.loads(path.read_text("utf-8"))
    if case.family not in HEIGHTS:
        pytest.skip("see test_prompt_ids")
    # One of the prompts writes special tokens.
    processor = in_mode(folder, data["mode"]).with_special_tokens("keep")
    expected = load_file(path.with_suffix(".safetensors"))
    for number, prompt in enumerate(data["prompts"]):
        row = {"query": prompt, "images": data["images"]}
        if prompt.count("<image>") > 1:
            with pytest.raises(DataError, match=r"1 image.*2 <image>"):
                processor.encode(row, GOLDEN)
            continue
        ids = processor.encode(row, GOLDEN).input_ids
        if "<image>" in prompt:
            assert torch.equal(ids, expected[f"input_ids.{number}"][0]), prompt
        else:
            tagged = processor.encode({**row, "query": f"<image>{prompt}"}, GOLDEN)
            assert torch.equal(ids, tagged.input_ids)


@pytest.mark.parametrize(("case", "path"), cases_of("crop_grid"), indirect=["case"])
def test_tiles_of_a_page(case, path, folder):
    data = json.loads(path.read_text("utf-8"))
    view = in_mode(folder, None).pixels.view
    for width, height, across, down, tokens in data["rows"]:
        tiles = (0, 0) if (across, down) == (1, 1) else (across, down)
        assert view((width, height), 1) == (tokens, tiles), (width, height)


@pytest.mark.parametrize(("case", "path"), cases_of("batch"), indirect=["case"])
def test_left_padded_batch(case, path, folder, shared_model):
    processor = in_mode(folder, None)
    data = json.loads(path.read_text("utf-8"))
    expected = load_file(path.with_suffix(".safetensors"))
    messages = data["conversations"]
    if case.family in HEIGHTS:
        # The last page is in another mode; with vlft all pages of a batch are in one.
        messages = messages[:2]
        expected = {name: tensor[:2] for name, tensor in expected.items()}
    samples = [processor.encode(row_of(message, data), GOLDEN) for message in messages]
    inputs = processor.collate(samples)
    del inputs["labels"]
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    with torch.no_grad():
        logits = shared_model(**inputs).logits
    kind = "golden padded logits" if case.family in HEIGHTS else "golden logits"
    assert_close(logits[:, -4:, ::4], expected["logits_last4"], kind)
    real = inputs["attention_mask"].bool()
    assert torch.equal(logits.argmax(-1)[real], expected["argmax_all"][real])
    replies = generate_replies(shared_model, processor, samples, Sampling(12))
    for reply, ids in zip(replies, expected["generated_ids"].tolist(), strict=True):
        assert reply.token_ids == ids[: len(reply.token_ids)]


@pytest.mark.parametrize(("case", "path"), cases_of("train"), indirect=["case"])
def test_loss_and_gradients(case, path, model, folder):
    """Computed from a packed row, as in training."""
    data = json.loads(path.read_text("utf-8"))
    expected = load_file(path.with_suffix(".safetensors"))
    processor = in_mode(folder, data.get("mode"))
    sample = processor.encode(row_of(data["conversation"], data), GOLDEN)
    assert torch.equal(sample.labels[1:], expected["labels"][0][1:])
    row = pack([sample], processor.chat.image_token_id)
    assert row.weight.sum() == data["n_label_tokens"]
    model.requires_grad_(True)
    loss = PackedLoss(model, folder.family)(row, pixels_of(row.images, processor))
    loss = loss / row.weight.sum()
    loss.backward()
    assert_close(loss.item(), data["loss"], "golden loss")
    native = {name: p.grad for name, p in model.named_parameters()}
    gradients = {}
    for name in data["grad_norms"]:
        match = folder.family.keys.from_original(name)
        gradients[name] = match.to_original([native[part] for part in match.native])
    for name, norm in data["grad_norms"].items():
        kind = "golden scalars" if gradients[name].numel() == 1 else "golden gradients"
        assert_close(gradients[name].double().norm().item(), norm, kind)
    whole = {name.removeprefix("grad."): t for name, t in expected.items() if "grad." in name}
    assert whole
    assert_close({name: gradients[name] for name in whole}, whole, "golden gradients")
    trained = {
        match.original
        for name, gradient in native.items()
        # Parts of the loss that a row lacks give zeros, so that all ranks reduce the same.
        if gradient is not None and gradient.any()
        for match in folder.family.keys.from_native(canonical_name(name), len(gradient))
    }
    for pattern in data["params_without_grad"]:
        assert not fnmatch.filter(trained, pattern), pattern
