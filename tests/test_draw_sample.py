"""The drawing sample: its classifier names every shape, and the tiny Janus draws some of them."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

import vlft
from vlft.checkpoints.convert import convert
from vlft.inference.draw import _as_image
from vlft.inference.reconstruct import reconstruct

FOLDER = Path(__file__).parents[1] / "sample_data" / "draw"
MODEL = FOLDER / "tiny-janus"


def script(name, folder=FOLDER):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # demo.py imports shapes.py, which stands beside it.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


shapes = script("shapes")
demo = script("demo")
PAIRS = [(colour, shape) for colour in shapes.COLOURS for shape in shapes.SHAPES]


@pytest.mark.parametrize(("colour", "shape"), PAIRS)
def test_the_classifier_knows_every_figure(colour, shape):
    for number in range(10):
        figure = shapes.random_figure(random.Random(f"{colour} {shape} {number}"), colour, shape)
        image = shapes.draw(figure)
        assert shapes.classify(image) == figure.name
        # As blurred as a drawing.
        assert shapes.classify(image.filter(ImageFilter.BoxBlur(0.7))) == figure.name


def test_the_classifier_refuses_what_is_no_figure():
    square = shapes.draw(shapes.Figure("red", "square", 16, 16, 9))
    assert shapes.classify(Image.new("RGB", (32, 32), "white")) is None
    assert shapes.classify(Image.new("RGB", (32, 32), "black")) is None
    chance = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=chance).numpy()
    assert shapes.classify(Image.fromarray(noise)) is None
    half = square.copy()
    half.paste("white", (4, 4, 18, 18))
    assert shapes.classify(half) is None
    other = square.copy()
    other.paste("grey", (6, 6, 26, 26))
    assert shapes.classify(other) is None
    assert shapes.classify(shapes.draw(shapes.Figure("red", "square", 16, 16, 9))) == "red square"


def test_a_drawing_is_right_if_its_prompt_names_it(tmp_path):
    path = tmp_path / "a.png"
    shapes.draw(shapes.Figure("blue", "cross", 16, 16, 9)).save(path)
    assert shapes.score(str(path), "Draw a blue cross.")
    assert not shapes.score(str(path), "Draw a blue circle.")
    assert not shapes.score(str(path), "Draw a red cross.")


def test_records_hold_each_pair_equally_often(tmp_path):
    shapes.write_records(tmp_path, "val", 64, of_base=False)
    rows = [json.loads(line) for line in (tmp_path / "val.jsonl").read_text().splitlines()]
    assert len({row["query"] for row in rows}) == 64
    for row in rows:
        assert shapes.score(str(tmp_path / row["response_images"][0]), row["query"])
    shapes.write_records(tmp_path, "base", 32, of_base=True)
    assert (tmp_path / "base.jsonl").read_text().count("figure") == 24


@pytest.fixture(scope="module")
def loaded():
    return vlft.load(MODEL)


def test_the_codes_of_the_tiny_model_keep_every_figure(loaded):
    model, processor = loaded
    generator = processor.family.generator
    for colour, shape in PAIRS:
        figure = shapes.random_figure(random.Random(f"kept {colour} {shape}"), colour, shape)
        (square,) = processor.pixels.transform(shapes.draw(figure), (0, 0))
        with torch.inference_mode():
            image = _as_image(generator.decode(model, generator.encode(model, square))[0])
        assert shapes.classify(image) == figure.name


def test_their_reconstruction(loaded, tmp_path):
    path = tmp_path / "a.png"
    shapes.draw(shapes.Figure("green", "triangle", 16, 16, 10)).save(path)
    found = reconstruct(*loaded, path)
    assert found.psnr > 20
    assert found.ssim > 0.8


def test_a_vq_model_of_one_block_survives_both_layouts(tmp_path):
    """The authors' config.json does not state the number of blocks where it is theirs, two."""
    for source, name in ((MODEL, "transformers"), (tmp_path / "transformers", "original")):
        convert(vlft.ConvertConfig(src=source, dst=tmp_path / name, format=name))
    before, after = (
        load_file(path / "model.safetensors") for path in (MODEL, tmp_path / "original")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_last_step_of_the_recipe_stores_what_it_is_given(tmp_path, monkeypatch):
    store = script("store_base", FOLDER.parent)
    monkeypatch.setattr(sys, "argv", ["store_base.py", str(MODEL), str(tmp_path / "stored")])
    store.main()
    before, after = (load_file(path / "model.safetensors") for path in (MODEL, tmp_path / "stored"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_tiny_model_is_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 1.2e6
