"""The sample documents of ``sample_data/ocr`` and the tiny model that reads them."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

import vlft
from vlft.checkpoints.locate import describe
from vlft.checkpoints.weights import read_tensors

FOLDER = Path(__file__).parents[1] / "sample_data" / "ocr"


def script(name):
    spec = importlib.util.spec_from_file_location(f"ocr_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Of a dataclass Python looks up the module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


pages, demo = script("pages"), script("demo")


def test_markdown_has_heading_table_and_text():
    rows = (("pea 7",), ("item", "eur"), ("rice", "0.40"), ("sum: 0.40",))
    page = pages.Page(rows, heading=True)
    table = "| item | eur |\n|---|---|\n| rice | 0.40 |"
    assert page.markdown == f"# pea 7\n\n{table}\n\nsum: 0.40"
    assert page.plain == "pea 7\nitem eur\nrice 0.40\nsum: 0.40"


def test_a_page_depends_on_its_number_alone(tmp_path, monkeypatch):
    for name, count in (("a", 2), ("b", 3)):
        words = ["pages.py", str(tmp_path / name), "--train", str(count), "--val", "1"]
        monkeypatch.setattr(sys, "argv", words)
        pages.main()
    first, more = ((tmp_path / name / "train.jsonl").read_text() for name in "ab")
    assert more.startswith(first)
    assert len(more.splitlines()) == 3
    for row in map(json.loads, first.splitlines()):
        image = row["images"][0]
        assert (tmp_path / "a" / image).read_bytes() == (tmp_path / "b" / image).read_bytes()


def test_what_is_printed_fits_on_the_page():
    for index in range(40):
        rng = random.Random(index)
        page = pages.document(rng) if index % 2 else pages.plain_page(rng, rows=(1, 5))
        glyphs = pages.draw(page, rng)[1]
        assert all(0 <= glyph.x <= 1 and 0 <= glyph.y <= 1 for glyph in glyphs)
        text = "".join(page.plain.split())
        assert "".join(glyph.text for glyph in glyphs) == text


@pytest.mark.parametrize(
    ("one", "other", "errors"), [("abc", "abc", 0), ("", "ab", 2), ("kitten", "sitting", 3)]
)
def test_distance(one, other, errors):
    assert demo.distance(one, other) == demo.distance(other, one) == errors


def test_the_recipe_makes_such_a_base(tmp_path, monkeypatch, capsys):
    """From random weights, with a few of its images; a second start goes on."""
    monkeypatch.syspath_prepend(FOLDER)
    recipe, out = script("base"), tmp_path / "out"
    words = ["base.py", str(tmp_path / "work"), "--out", str(out), "--reading", "8", "--pages", "8"]
    lines = []
    for count in ("8", "16"):
        monkeypatch.setattr(sys, "argv", [*words, "--writing", count])
        recipe.main()
        lines.append([line.split()[:2] for line in capsys.readouterr().out.splitlines()])
    assert [line[:2] for line in lines] == [
        [["reading", "8"], ["writing", "8"]],
        [["writing", "16"], [f"{out}:", lines[1][1][1]]],
    ]
    made, base = describe(out), describe(FOLDER / "tiny-ocr")
    assert made.config == base.config
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made.path / name).read_bytes() == (base.path / name).read_bytes()
    weights = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in read_tensors(folder.path)}
        for folder in (made, base)
    ]
    assert weights[0] == weights[1]


def test_the_base_reads_some_but_not_well(tmp_path):
    model, processor = vlft.load(FOLDER / "tiny-ocr", device="cpu", dtype="float32")
    assert describe(FOLDER / "tiny-ocr").family.name == "deepseek_ocr"
    rows, texts = [], []
    for index in range(8):
        rng = random.Random(f"test {index}")
        page = pages.document(rng)
        pages.draw(page, rng)[0].save(tmp_path / f"{index}.png")
        rows.append({"query": pages.QUERY, "images": [f"{index}.png"]})
        texts.append(page)
    replies = vlft.generate(model, processor, rows, 80, image_root=tmp_path, no_repeat_ngram=0)
    found = [reply.text for reply in replies]
    plain = sum(map(demo.distance, found, [page.plain for page in texts]))
    assert plain < 0.4 * sum(len(page.plain) for page in texts)
    markdown = sum(map(demo.distance, found, [page.markdown for page in texts]))
    assert markdown > 0.3 * sum(len(page.markdown) for page in texts)
