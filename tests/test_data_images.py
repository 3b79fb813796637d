"""Images -> RGB as in the authors' code, and the errors for files that are not images."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image, ImageFile

from vlft.data import images
from vlft.data.conversation import ImageFacts
from vlft.data.images import decoded, inspect_image, inspect_images
from vlft.errors import DataError

IMAGES = GOLDEN / "images"

# What the authors' code read from each image, from every golden case.
EXPECTED = {
    entry["file"]: entry
    for path in sorted((GOLDEN / "cases" / "deepseek-vl-siglip").glob("*.json"))
    for entry in json.loads(path.read_text("utf-8")).get("images") or []
}


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def decode(path: Path, **options: object) -> Image.Image:
    with decoded(path, **options) as image:
        return image


def message(path: str | Path, place: str = "") -> str:
    with pytest.raises(DataError) as error:
        inspect_image(Path(path), place=place)
    return str(error.value)


class TestDecode:
    @pytest.mark.parametrize("name", sorted(EXPECTED))
    def test_pixels_are_those_of_the_authors(self, name):
        expected = EXPECTED[name]
        image = decode(GOLDEN / name)
        assert image.mode == "RGB"
        assert list(image.size) == expected["size_used"]
        assert hashlib.sha256(image.tobytes()).hexdigest() == expected["rgb_sha256"]

    def test_the_golden_cases_hold_every_mode(self):
        modes = {entry["mode_in_file"] for entry in EXPECTED.values()}
        assert modes >= {"RGB", "RGBA", "P", "L", "LA", "1"}
        assert {entry["exif_orientation"] for entry in EXPECTED.values()} == {None, 6}

    def test_alpha_is_dropped_not_blended(self):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
        pixels[0, :, 3] = 0
        Image.fromarray(pixels, "RGBA").save("a.png")
        np.testing.assert_array_equal(np.asarray(decode(Path("a.png"))), pixels[..., :3])

    def test_orientation_in_exif_is_ignored(self):
        image = decode(IMAGES / "exif_rot.jpg")
        with Image.open(IMAGES / "exif_rot.jpg") as stored:
            assert stored.getexif()[0x0112] == 6
            assert image.size == stored.size
            np.testing.assert_array_equal(np.asarray(image), np.asarray(stored))

    def test_cmyk(self):
        with Image.open(IMAGES / "cmyk.jpg") as stored:
            assert stored.mode == "CMYK"
            inks = np.asarray(stored).astype(float)
        light = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
        assert np.abs(np.asarray(decode(IMAGES / "cmyk.jpg")) - light).max() <= 1

    def test_of_an_animation_the_first_frame(self):
        with Image.open(IMAGES / "anim.gif") as stored:
            frames = []
            for number in range(stored.n_frames):
                stored.seek(number)
                frames.append(np.asarray(stored.convert("RGB")))
        assert len(frames) > 1
        assert not np.array_equal(frames[0], frames[1])
        np.testing.assert_array_equal(np.asarray(decode(IMAGES / "anim.gif")), frames[0])


class TestBroken:
    def test_missing(self):
        assert message("no.jpg") == (
            "no.jpg: no such image\n"
            " hint: paths start at the data file's folder, or at --image-root"
        )
        assert message("no.jpg", "a.jsonl:3").startswith("a.jsonl:3: no.jpg: no such image\n")

    def test_a_whole_path_is_named_from_the_working_folder(self, tmp_path):
        assert message(tmp_path / "sub" / "no.jpg").startswith("sub/no.jpg: no such image")
        assert message("/nowhere/no.jpg").startswith("/nowhere/no.jpg: no such image")

    def test_beside_a_file(self):
        Path("a.jpg").write_bytes(b"")
        assert message("a.jpg/b.jpg").startswith("a.jpg/b.jpg: no such image")

    @pytest.mark.parametrize(
        ("name", "share"),
        [
            *((name, share) for name in ("photo_a.jpg", "chart.png") for share in (0.3, 0.6, 0.9)),
            ("cmyk.jpg", 0.9),
            ("anim.gif", 0.2),
        ],
    )
    def test_cut_short(self, name, share):
        content = (IMAGES / name).read_bytes()
        Path(name).write_bytes(content[: int(len(content) * share)])
        assert re.fullmatch(
            rf"{name}: not a whole image \((.*truncated.*|broken PNG file.*)\)\n"
            r" hint: replace the file, or drop such records with --on-bad-sample skip",
            message(name),
        )

    def test_a_checksum_that_is_wrong(self):
        content = bytearray((IMAGES / "chart.png").read_bytes())
        content[content.index(b"IDAT") + 20] ^= 0xFF
        Path("a.png").write_bytes(content)
        assert "not a whole image (" in message("a.png")

    @pytest.mark.parametrize("error", [RuntimeError, ValueError, SyntaxError, OSError])
    def test_whatever_a_decoder_raises_is_said_with_the_place(self, monkeypatch, error):
        def fail(*_: object, **_settings) -> None:
            raise error("Failed to decode image")

        Path("a.avif").touch()
        monkeypatch.setattr(Image, "open", fail)
        assert message("a.avif", "a.jsonl:1").startswith(
            "a.jsonl:1: a.avif: not a whole image (Failed to decode image)\n"
        )

    def test_an_endless_name_is_cut(self):
        assert re.match(r"x{100}\.\.\.x{56}\.jpg: cannot be read \(File name too long\)\n", (
            message(5000 * "x" + ".jpg")
        ))  # fmt: skip


class TestInspect:
    def test_every_file_has_facts_or_an_error(self):
        good = [IMAGES / "photo_a.jpg", IMAGES / "rgba.png"]
        Path("bad.png").write_bytes(b"x")
        found = inspect_images([*good, Path("bad.png"), Path("no.png"), *good, Path("bad.png")])
        errors = {str(p): e.message for p, e in found.items() if isinstance(e, DataError)}
        assert errors == {
            "bad.png": "not an image of a known format",
            "no.png": "no such image",
        }
        assert [path for path in found if str(path) not in errors] == good

    @pytest.mark.parametrize("name", sorted(EXPECTED))
    def test_the_digest_is_of_the_bytes_and_the_size_of_the_pixels(self, name):
        content = (GOLDEN / name).read_bytes()
        Path("copy").write_bytes(content)
        size = tuple(EXPECTED[name]["size_used"])
        facts = inspect_image(Path("copy"))
        assert facts == inspect_image(GOLDEN / name)
        assert (facts.digest, facts.size) == (hashlib.sha256(content).hexdigest(), size)

    @pytest.mark.parametrize("total", [160, 10])
    @pytest.mark.parametrize("copies", [1, 2])
    def test_pixels_in_flight_are_bounded(self, monkeypatch, total, copies):
        """However many threads there are; an image above the bound is decoded alone.

        A check holds the image as it is stored, decoding a copy in RGB too.
        """
        most = max(1, total // (40 * copies))
        seen, lock, running = [], threading.Lock(), 0
        # So many are decoded at the same time; else it breaks.
        together = threading.Barrier(most)

        def work(path: Path) -> tuple[int, int]:
            if copies == 1:
                return inspect_image(path).size
            with decoded(path) as image:
                return count(image)

        def count(image: Image.Image) -> tuple[int, int]:
            nonlocal running
            with lock:
                running += 1
                seen.append(running)
            together.wait(20)
            time.sleep(0.01)
            with lock:
                running -= 1
            return image.size

        load = ImageFile.ImageFile.load
        if copies == 1:
            monkeypatch.setattr(
                ImageFile.ImageFile, "load", lambda image: (load(image), count(image))[0]
            )
        monkeypatch.setattr(images, "_budget", images._Budget(total))
        for number in range(12):
            Image.new("L", (40, 1), number).save(f"{number}.png")
        with ThreadPoolExecutor(8) as pool:
            sizes = set(pool.map(work, [Path(f"{number}.png") for number in range(12)]))
        assert sizes == {(40, 1)}
        assert max(seen) == most

    def test_they_follow_the_file(self):
        path = Path("a.png")
        for number in range(1, 4):
            Image.new("RGB", (number, 1)).save(path)
            os.utime(path, ns=(1, 1))
            facts = inspect_image(path)
            assert facts == ImageFacts(hashlib.sha256(path.read_bytes()).hexdigest(), (number, 1))

    def test_a_file_with_other_bytes_is_refused_where_the_digest_is_given(self):
        path = Path("a.png")
        Image.new("RGB", (2, 1)).save(path)
        digest = inspect_image(path).digest
        assert decode(path, digest=digest).size == (2, 1)
        Image.new("RGB", (3, 1)).save(path)
        assert decode(path).size == (3, 1)
        with pytest.raises(DataError, match=r"^a\.png: the image has changed since the data was"):
            decode(path, digest=digest)


def test_no_other_program_is_started(tmp_path):
    """Pillow would hand this to Ghostscript."""
    path = tmp_path / "a.eps"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(DataError, match="PostScript"):
        decode(path)
