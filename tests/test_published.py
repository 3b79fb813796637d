"""The thirteen published checkpoints, by arithmetic: every tensor of their files has its place.

published.json lists the tensors independently of vlft, which builds the model on the meta device
from the config.json as published. No weight is ever made.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest
from published import PUBLISHED, count

from vlft.checkpoints.load import empty_model
from vlft.checkpoints.locate import ModelFolder
from vlft.families.registry import FAMILIES, find_family
from vlft.families.tiles import Tiling
from vlft.planning.published import PUBLISHED_MODELS

BY_NAME = {published.name: published for published in PUBLISHED}


@pytest.fixture(params=BY_NAME, scope="module")
def published(request):
    return BY_NAME[request.param]


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    (path / "config.json").write_text(json.dumps(published.config))
    family, layout = find_family(published.config, place=published.name)
    return ModelFolder(path, published.name, dict(published.config), family, layout)


@pytest.fixture(scope="module")
def model(folder):
    return empty_model(folder, image_token_id=1)


def test_every_tensor_has_its_place(published, folder, model):
    """Original and native tensors correspond one to one, with their shapes."""
    keys = folder.family.keys
    native = {name: tuple(p.shape) for name, p in model.named_parameters()}
    filled: Counter[str] = Counter()
    for name, shape in published.tensors().items():
        if keys.is_unused(name):
            continue
        match = keys.from_original(name)
        assert match is not None, name
        size = native[match.native[0]]
        if match.change == "stack":
            expected = (size[1] // match.part[1], *size[2:])
            assert match.index < size[0], name
        elif match.change == "split":
            expected = (sum(native[part][0] for part in match.native), *size[1:])
        else:
            expected = (1, *size) if match.change == "squeeze" else size
        assert shape == expected, name
        filled.update(dict.fromkeys(match.native, 1))
        # And back: the native names lead to this original.
        length = size[0] if size else 1
        assert match in keys.from_native(match.native[0], length), name
    assert filled.keys() == native.keys()
    for name, shape in native.items():
        assert filled[name] == len(keys.from_native(name, shape[0])), name


def test_what_is_not_used_is_known(published, folder):
    unused = {n.split(".")[-1] for n in published.tensors() if folder.family.keys.is_unused(n)}
    assert unused <= {"weight", "bias", "latent", "codebook_used"}
    total = sum(
        count({n: s}) for n, s in published.tensors().items() if folder.family.keys.is_unused(n)
    )
    assert total < 0.02 * count(published.tensors())


def test_parameters_as_listed(published, folder, model):
    """``vlft models`` shows the size of the files."""
    known = next(known for known in PUBLISHED_MODELS if known.id == published.name)
    assert known.family == folder.family.name
    assert known.billions == pytest.approx(count(published.tensors()) / 1e9, abs=0.006)
    used = sum(p.numel() for p in model.parameters()) / 1e9
    assert used == pytest.approx(known.billions, rel=0.02)


def test_image_tokens_as_listed(published, folder):
    known = next(known for known in PUBLISHED_MODELS if known.id == published.name)
    native = folder.native_config(image_token_id=1)
    pixels = folder.family.pixels(folder.path, folder.config, native)
    if pixels.tokens is not None:
        assert known.image_tokens == (pixels.tokens, pixels.tokens)
    elif pixels.modes:
        sides = [(width, height) for width in (100, 9000) for height in range(100, 9001, 100)]
        tokens = [pixels.view(size, 1)[0] for size in (*sides, (9000, 1000))]
        assert known.image_tokens == (min(tokens), max(tokens))
    else:
        candidates = published.config["candidate_resolutions"]
        tiling = Tiling(384, candidates, side=14, mean=(), std=())
        tokens = [tiling.tokens((width // 384, height // 384)) for width, height in candidates]
        assert known.image_tokens == (min(tokens), max(tokens))


def test_config_there_and_back(folder):
    """A config.json written in the authors' layout means the same to the class."""
    native = folder.native_config(image_token_id=1)
    if folder.family.original_config is not None:
        means = dict.fromkeys(("mean", "std"), [0.5] * 3)
        images = {f"{k}image_{m}": v for k in ("", "high_res_") for m, v in means.items()}
        written = folder.family.original_config(native, "float32", images)
        assert folder.family.native_config(written, 1) == native


def test_a_model_type_is_given_to_transformers_layout_where_there_is_one():
    for family in FAMILIES:
        assert family.has_transformers_layout == ("transformers" in family.model_types.values())


def test_every_family_is_listed():
    assert {known.id for known in PUBLISHED_MODELS} == BY_NAME.keys()
    assert {known.family for known in PUBLISHED_MODELS} == {family.name for family in FAMILIES}
