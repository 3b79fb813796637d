"""--exif, --max-tiles, --max-image-tokens: in a run, in what follows it, in a merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, OCR, OCR2, SIGLIP, VL2_MHA
from PIL import Image

from vlft.checkpoints.locate import locate_model
from vlft.config import InferConfig, SftConfig
from vlft.errors import CheckpointError, ConfigError, DataError
from vlft.families.image_settings import ImageSettings, state_image_settings
from vlft.families.pixels import HALF
from vlft.families.tiles import Tiling, tiled_pixels

# The grids of the published DeepSeek-VL2.
PUBLISHED = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1),
             (1, 6), (6, 1), (2, 3), (3, 2), (1, 7), (7, 1), (4, 2), (2, 4), (1, 8), (8, 1),
             (3, 3), (1, 9), (9, 1)]  # fmt: skip
SIZES = [(384, 384), (4000, 3000), (100, 900), (2000, 500), (1, 1), (3000, 1000)]


@pytest.fixture(scope="module")
def base():
    return locate_model(str(VL2_MHA.folder)).processor()


@pytest.fixture(scope="module")
def published():
    candidates = tuple((384 * across, 384 * down) for across, down in PUBLISHED)
    return tiled_pixels(Tiling(384, candidates, 14, HALF, HALF))


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 9, 50])
def test_tiles(published, most):
    limited = published.limit(most, None)
    for size in SIZES:
        tokens, (across, down) = limited.view(size, 1)
        assert across * down <= most
        if np.prod(published.view(size, 1)[1]) <= most:
            assert limited.view(size, 1) == published.view(size, 1)
        assert limited.view(size, 3) == published.view(size, 3)
        assert tokens >= 421
    assert (limited.fingerprint == published.fingerprint) == (most >= 9)


@pytest.mark.parametrize(("most", "largest"), [(421, 421), (1000, 925), (2101, 2101)])
def test_tokens(published, most, largest):
    limited = published.limit(None, most)
    grids = limited.stated["config.json"]["candidate_resolutions"]
    counts = [limited.view((width, height), 1)[0] for width, height in grids]
    assert max(counts) <= most
    assert counts[0] == 421
    assert max(limited.view(size, 1)[0] for size in SIZES) <= largest


def test_refused(published, base):
    with pytest.raises(ConfigError) as error:
        published.limit(None, 420)
    assert str(error.value) == (
        "--max-image-tokens: too low for this model: an image has at least 421 tokens, "
        "1 tile(s)\n hint: raise it"
    )
    siglip = locate_model(str(SIGLIP.folder)).processor()
    with pytest.raises(ConfigError) as error:
        ImageSettings(max_tiles=2, max_image_tokens=900).apply(siglip)
    assert str(error.value) == (
        "--max-tiles, --max-image-tokens: DeepSeek-VL (SigLIP tower) has no tiles, which could be "
        "limited\n"
        " hint: leave it out"
    )
    with pytest.raises(CheckpointError, match=r"run_config\.json, --max-tiles: .* has no tiles"):
        ImageSettings(max_tiles=2).apply(siglip, Path("run_config.json"))


def test_a_command_follows_the_run_where_it_is_silent():
    run = SftConfig(exif="rotate", max_tiles=4)
    assert ImageSettings.of(InferConfig(), run) == ImageSettings("rotate", 4)
    given = InferConfig(exif="auto", max_tiles=2, max_image_tokens=9)
    assert ImageSettings.of(given, run) == ImageSettings("auto", 2, 9)
    assert ImageSettings.of(InferConfig()) == ImageSettings()


def test_a_trained_model_says_so_in_its_files(base, tmp_path):
    """And loads with the same processor, whatever reads candidate_resolutions."""
    model = shutil.copytree(VL2_MHA.folder, tmp_path / "model")
    settings = ImageSettings("rotate", max_tiles=3)
    state_image_settings(model, settings, base)
    there, here = locate_model(str(model)).processor().pixels, settings.apply(base).pixels
    assert there.rotate
    assert there.fingerprint == here.fingerprint != base.pixels.fingerprint
    for name in ("config.json", "processor_config.json"):
        grids = json.loads((model / name).read_text())["candidate_resolutions"]
        assert max(width * height for width, height in grids) == 3 * 76 * 76
    image = Image.effect_noise((200, 150), 60).convert("RGB")
    for size in SIZES:
        assert there.view(size, 1) == here.view(size, 1)
    tiles = here.view(image.size, 1)[1]
    (found,), (expected,) = (pixels.transform(image, tiles) for pixels in (there, here))
    assert found.equal(expected)


class TestPages:
    """DeepSeek-OCR; test_golden.py has the authors' modes and grids."""

    @pytest.fixture
    def page(self):
        return locate_model(str(OCR.folder)).processor()

    def test_fewer_tiles(self, page):
        six = ImageSettings(max_tiles=6).apply(page).pixels
        for size in [(640, 640), (850, 1100), (1100, 850), (9000, 1000), (2000, 2000)]:
            tokens, (across, down) = six.view(size, 1)
            assert across * down <= 6
            assert tokens == 273 + 10 * down * (10 * across + 1) * (across > 0)
        assert page.pixels.view((2000, 2000), 1)[1] == (3, 3)
        assert six.view((2000, 2000), 1)[1] == (2, 2)
        few = ImageSettings(max_image_tokens=700).apply(page).pixels
        assert max(few.view(size, 1)[0] for size in SIZES) <= 700

    def test_a_trained_model_says_so_in_its_files(self, page, tmp_path):
        model = shutil.copytree(OCR.folder, tmp_path / "model")
        for settings in (ImageSettings(image_mode="small"), ImageSettings(max_tiles=4)):
            state_image_settings(model, settings, page)
            there, here = locate_model(str(model)).processor(), settings.apply(page)
            assert there.pixels.fingerprint == here.pixels.fingerprint
            assert there.pixels.fingerprint != page.pixels.fingerprint
            for files in there.pixels.files.values():
                stated = there.pixels.stated["processor_config.json"]
                assert stated.items() <= files["processor_config.json"].items()
            shutil.copy(OCR.folder / "processor_config.json", model)

    @pytest.mark.parametrize(
        ("case", "settings", "message"),
        [
            (OCR2, {"image_mode": "tiny"},
             "--image-mode: DeepSeek-OCR-2 has no image mode tiny\n"
             " hint: allowed: gundam, small, base"),
            (SIGLIP, {"image_mode": "base"},
             "--image-mode: DeepSeek-VL (SigLIP tower) has no image mode base\n"
             " hint: leave it out"),
            (OCR, {"image_mode": "base", "max_tiles": 4},
             "--max-tiles: DeepSeek-OCR has no tiles in mode base, which could be limited\n"
             " hint: leave it out"),
            (OCR, {"max_image_tokens": 272},
             "--max-image-tokens: found 272; the whole page has 273 in mode gundam\n"
             " hint: raise it, or choose another --image-mode"),
        ],
    )  # fmt: skip
    def test_refused(self, case, settings, message):
        with pytest.raises(ConfigError) as error:
            ImageSettings(**settings).apply(locate_model(str(case.folder)).processor())
        assert str(error.value) == message

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"history": [["<image>a", "b"]], "query": "c"}, "2 turns; the model was trained on"),
            ({"query": "<image><image>a", "images": ["images/ocr_641.png"] * 2}, "2 images; the"),
            ({"query": "a", "system": "b"}, "a system prompt; the model was trained without"),
        ],
    )
    def test_what_the_authors_code_does_not_take_is_refused(self, page, row, message):
        with pytest.raises(DataError, match=message):
            page.encode({"images": ["images/ocr_641.png"] * ("history" in row), **row}, GOLDEN)
