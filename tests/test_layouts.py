"""A layout written from the other one: stock transformers opens it, and no setting is lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import (
    GOLDEN,
    HYBRID,
    JANUS,
    JANUS_PRO,
    OCR,
    OCR2,
    SIGLIP,
    VL2_MLA,
    VL2_NOAUX,
    logits,
    only_siglip,
)
from jinja2 import TemplateError
from launched import small_config
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import vlft
from vlft.checkpoints import small_files
from vlft.checkpoints.convert import convert
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.config import ConvertConfig
from vlft.errors import CheckpointError, VerificationError
from vlft.families.processor import template_source
from vlft.inference.generate import generate

BOTH_LAYOUTS = [SIGLIP, HYBRID, JANUS, JANUS_PRO]
CPU = Placement(torch.device("cpu"), torch.float32)
SMALL = ("*.json", "*.jinja", "*.txt")


def converted(source, target, layout):
    return describe(convert(ConvertConfig(src=str(source), dst=target, format=layout)))


def edit_json(path, keys, value):
    """Sets the field at ``keys``, as ``vision_config.hidden_act``; None removes it."""
    content = json.loads(path.read_text("utf-8"))
    *outer, last = keys.split(".")
    place = content
    for key in outer:
        place = place[key]
    place.pop(last, None)
    if value is not None:
        place[last] = value
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("case", BOTH_LAYOUTS, indirect=True, scope="session", ids=str)
def test_stock_classes_give_ids_logits_and_replies_of_vlft(case, processor, model, tmp_path):
    path = converted(case.folder, tmp_path / "new", "transformers").path
    opens_in_stock_classes(path, processor, model)


@pytest.mark.parametrize("case", BOTH_LAYOUTS, indirect=True, scope="session", ids=str)
def test_so_do_those_of_a_merged_folder(case, tmp_path):
    config = dataclasses.replace(small_config(case, tmp_path), max_steps=1)
    path = tmp_path / "merged"
    vlft.merge_lora(
        vlft.MergeLoraConfig(
            ckpt_dir=vlft.sft(config).checkpoint,
            output_dir=path,
            format="transformers",
            dtype="float32",
        )
    )
    model, processor = vlft.load(path, dtype="float32")
    opens_in_stock_classes(path, processor, model)


def opens_in_stock_classes(path, processor, model):
    stock = AutoProcessor.from_pretrained(path)
    image = str(GOLDEN / "images" / "photo_b.jpg")
    row = {"query": "<image>Wie heißt <image>das? 你好", "images": [image, image]}
    parts = [
        {"type": "image", "path": image},
        {"type": "text", "text": "Wie heißt "},
        {"type": "image", "path": image},
        {"type": "text", "text": "das? 你好"},
    ]
    batch = stock.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    sample, chat = processor.encode(row), processor.chat
    tokens = stock.tokenizer
    assert (tokens.bos_token_id, tokens.eos_token_id) == (chat.bos_id, chat.eos_id)
    assert (tokens.pad_token_id, tokens.padding_side) == (chat.pad_id, "left")
    assert batch["input_ids"][0].tolist() == sample.input_ids.tolist()
    ours = processor.collate([sample])
    del ours["labels"]
    assert batch.keys() == ours.keys()
    assert all(batch[name].shape == ours[name].shape for name in ours)
    theirs = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    ours["input_ids"] = batch["input_ids"]
    assert torch.equal(logits(theirs, ours), logits(model, ours))
    found = theirs.generate(**ours, max_new_tokens=8, do_sample=False)
    reply = found[0, len(sample) :].tolist()
    assert reply == generate(model, processor, [row], max_new_tokens=8)[0].token_ids


@pytest.mark.parametrize("case", [OCR, OCR2], indirect=True, scope="session", ids=str)
def test_the_plain_prompts_of_ocr_have_a_chat_template(case, tmp_path):
    path = converted(case.folder, tmp_path / "new", "transformers").path
    ours, stock = describe(path).processor(), AutoTokenizer.from_pretrained(path)
    image = GOLDEN / "images" / "photo_b.jpg"
    for query in ("<image>\nFree OCR. ", "Say it."):
        images = [str(image)] * query.count("<image>")
        expected = ours.encode({"query": query, "images": images}).input_ids.tolist()
        found = stock.apply_chat_template(
            [{"role": "user", "content": query}], tokenize=True, return_dict=True
        )["input_ids"]
        assert [i for i, _ in itertools.groupby(expected)] == found
        parts = [{"type": "image"}] * len(images)
        parts.append({"type": "text", "text": query.removeprefix("<image>")})
        text = stock.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        assert text == ours.chat.tokenizer.id_to_token(ours.chat.bos_id) + query.strip()
    more = [{"type": "image"}] * 2
    for messages, reason in (
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "one message"),
        ([{"role": "system", "content": "a"}], "one message of the user"),
        ([{"role": "user", "content": more}], "one image"),
    ):
        with pytest.raises(TemplateError, match=reason):
            stock.apply_chat_template(messages, tokenize=False)
    if find_spec("torchvision"):  # Their image processors need it; vlft does not.
        parts = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "\nA"}]
        batch = AutoProcessor.from_pretrained(path).apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=True, return_dict=True
        )
        expected = ours.encode({"query": "<image>\nA", "images": [str(image)]}).input_ids
        assert [*batch["input_ids"][0]] == expected.tolist()


@pytest.mark.parametrize("case", [SIGLIP, JANUS_PRO], indirect=True, scope="session", ids=str)
def test_a_folder_from_before_is_mended(case, processor, tmp_path):
    """Converted again, one without names of special tokens, BOS and chat template has all."""
    old = converted(case.folder, tmp_path / "old", "transformers").path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(case.folder / name, old)
    if case.family != "janus":
        (old / "chat_template.jinja").unlink()
    new = converted(old, tmp_path / "new", "transformers")
    again = converted(new.path, tmp_path / "again", "transformers")
    assert (new.path / "chat_template.jinja").read_text() == (
        again.path / "chat_template.jinja"
    ).read_text()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((new.path / name).read_text()) == json.loads(
            (again.path / name).read_text()
        )
    assert new.processor().chat.roles == processor.chat.roles


@only_siglip
@pytest.mark.parametrize("broken", ["template", "bos"])
def test_other_ids_are_no_success(case, tmp_path, monkeypatch, broken):
    if broken == "template":
        monkeypatch.setattr(
            small_files, "template_source", lambda name: template_source(name).replace(":", " :")
        )
    else:
        monkeypatch.setattr(small_files, "_with_bos", lambda inner, *_: inner)
    with pytest.raises(VerificationError, match="AutoProcessor gives other token ids than vlft"):
        converted(case.folder, tmp_path / "new", "transformers")
    assert not (tmp_path / "new").exists()


def test_the_authors_layout_keeps_small_files(case, tmp_path):
    """config.json is compared by value, because it states the dtype of what is written."""
    new = converted(case.folder, tmp_path / "new", "original").path
    names = {
        p.name for pattern in SMALL for p in case.folder.glob(pattern) if ".index." not in p.name
    }
    assert {p.name for pattern in SMALL for p in new.glob(pattern)} == names
    for name in names - {"config.json"}:
        assert (new / name).read_bytes() == (case.folder / name).read_bytes()
    assert json.loads((new / "config.json").read_bytes()) == json.loads(
        (case.folder / "config.json").read_bytes()
    )


@pytest.mark.parametrize("case", BOTH_LAYOUTS, indirect=True, scope="session", ids=str)
def test_there_and_back_the_tokenizer_is_the_authors(case, tmp_path):
    """The class of the authors' processor takes BOS from tokenizer_config.json."""
    there = converted(case.folder, tmp_path / "there", "transformers").path
    back = converted(there, tmp_path / "back", "original").path
    before, after = (json.loads((p / "tokenizer.json").read_text()) for p in (case.folder, back))
    assert after["post_processor"] == before["post_processor"]
    config = json.loads((back / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizerFast"
    assert config["processor_class"] == "VLChatProcessor"
    assert config["add_bos_token"] is True
    assert "extra_special_tokens" not in config


LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
IMAGES, CONFIG = "preprocessor_config.json", "config.json"


@pytest.mark.parametrize(
    ("case", "file", "field", "value"),
    [
        (HYBRID, IMAGES, "image_std", [0.2, 0.3, 0.4]),
        (HYBRID, IMAGES, "high_res_image_mean", [0.1, 0.2, 0.3]),
        (SIGLIP, IMAGES, "min_size", 90),
        (JANUS, IMAGES, "rescale_factor", 0.005),
        (SIGLIP, CONFIG, "text_config.rms_norm_eps", 1e-3),
        (JANUS, CONFIG, "text_config.rope_parameters", LINEAR_ROPE),
        (HYBRID, CONFIG, "text_config.hidden_act", "gelu"),
    ],
    indirect=["case"], ids=str,
)  # fmt: skip
def test_a_setting_survives(case, inputs, processor, tmp_path, file, field, value):
    there = converted(case.folder, tmp_path / "there", "transformers")
    edit_json(there.path / file, field, value)
    there = describe(there.path)
    back = converted(there.path, tmp_path / "back", "original")
    sample = there.processor().encode(
        {"query": "<image>?", "images": ["chart.png"]}, GOLDEN / "images"
    )
    before, after = (f.processor().image_inputs(sample.images) for f in (there, back))
    assert all(torch.equal(before[name], after[name]) for name in before)
    pixels = processor.image_inputs(sample.images)
    assert (file == IMAGES) != all(torch.equal(before[name], pixels[name]) for name in pixels)
    given, kept = (logits(load_model(f, CPU), inputs) for f in (there, back))
    assert torch.equal(given, kept)


@pytest.mark.parametrize(
    ("case", "field", "value", "named"),
    [
        (SIGLIP, "vision_config.hidden_act", "quick_gelu", "hidden_act 'quick_gelu' (it would"),
        (SIGLIP, "vision_config.hidden_act", None, "hidden_act 'gelu_pytorch_tanh'"),
        (JANUS, "vision_config.layer_norm_eps", 1e-4, "layer_norm_eps 0.0001"),
        (HYBRID, "high_res_vision_config.layer_norm_eps", 1e-4, "high_res_vision_config.layer"),
        (HYBRID, "high_res_vision_config.hidden_act", "silu", "hidden_act 'silu'"),
        (JANUS, "vq_config.hidden_act", "silu", "vq_config.hidden_act 'silu'"),
    ],
    indirect=["case"], ids=str,
)  # fmt: skip
def test_a_setting_without_a_field_is_named(case, tmp_path, field, value, named):
    there = converted(case.folder, tmp_path / "there", "transformers").path
    edit_json(there / "config.json", field, value)
    with pytest.raises(CheckpointError, match="no field for") as error:
        converted(there, tmp_path / "back", "original")
    assert named in str(error.value)
    assert "--format transformers" in str(error.value)


@pytest.mark.parametrize(
    "case", [SIGLIP, VL2_MLA, VL2_NOAUX, JANUS_PRO], indirect=True, scope="session", ids=str
)
def test_the_lines_for_autotokenizer(case, processor):
    """The code of docs/models.md; the tokenizer of deepseek-vl2-mla lacks the added tokens."""
    docs = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
    code = docs.partition("```python\n")[2].partition("```")[0]
    row = {"query": "Hello <image>, 你好 12.", "images": ["chart.png"]}
    if case.family != "deepseek_vl2":
        row["history"] = [["A?", "B!"]]
    sample, tag = processor.encode(row, GOLDEN / "images"), processor.family.image_tag
    count = int((sample.input_ids == processor.chat.image_token_id).sum())
    start, end = processor.family.image_border or ("", "")
    names = {
        "AutoTokenizer": AutoTokenizer,
        "folder": case.folder,
        "added_tokens": list(processor.family.added_tokens),
        "text": sample.text.replace(tag, start + tag * count + end),
    }
    exec(code, names)
    assert names["ids"] == sample.input_ids.tolist()
    assert all(repr(token).strip("'") in docs for token in processor.family.added_tokens)
