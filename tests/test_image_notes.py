"""What users are told of images that are read, but not as they would expect."""

from __future__ import annotations

import base64
import json
import logging
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import SIGLIP
from PIL import Image, features

import vlft
from vlft.checkpoints.locate import locate_model
from vlft.cli.check import run_check
from vlft.config import CheckConfig, InferConfig, MergeLoraConfig, SftConfig
from vlft.data import download, embedded, image_notes, images, references
from vlft.data.containers import text
from vlft.data.image_kinds import what_it_is
from vlft.data.images import decoded, inspect_image, inspect_images
from vlft.errors import DataError

RNG = np.random.default_rng(7)
NOISE = Image.fromarray(RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def decode(path: Path, **options: object) -> Image.Image:
    with decoded(path, **options) as image:
        return image


def notes(path: str, **options: bool) -> list[tuple[str, str]]:
    return [(note.kind, note.detail) for note in inspect_image(Path(path), **options).notes]


def with_orientation(value: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


class TestOrientation:
    @pytest.mark.parametrize("value", range(1, 9))
    @pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
    def test_images_are_turned_only_if_asked(self, value, ending):
        """The upright image, stored as a camera that was held in each of the ways does."""
        upright = Image.new("RGB", (48, 32), "white")
        upright.paste("black", (0, 0, 16, 16))
        back = {6: 8, 8: 6}.get(value, value)
        stored = upright if value == 1 else upright.transpose(image_notes.TURNS[back])
        stored.save(f"a.{ending}", exif=with_orientation(value), quality=95)
        path = Path(f"a.{ending}")
        expected = [] if value == 1 else [("turned", f"EXIF orientation {value}")]
        assert notes(path) == expected
        assert inspect_image(path).size == decode(path).size == stored.size
        assert notes(path, rotate=True) == []
        assert inspect_image(path, rotate=True).size == (48, 32)
        difference = np.asarray(decode(path, rotate=True)).astype(int) - np.asarray(upright)
        assert np.abs(difference).mean() < 10

    @pytest.mark.parametrize("value", [0, 9, 600])
    def test_a_value_that_exif_does_not_have_turns_nothing(self, value):
        NOISE.save("a.png", exif=with_orientation(value))
        assert notes("a.png") == []
        assert inspect_image(Path("a.png"), rotate=True).size == NOISE.size

    def test_a_tiff_is_turned_by_pillow_and_not_twice(self):
        NOISE.save("a.tif", exif=with_orientation(6))
        for rotate in (False, True):
            assert notes("a.tif", rotate=rotate) == []
            facts = inspect_image(Path("a.tif"), rotate=rotate)
            assert facts.size == decode(Path("a.tif"), rotate=rotate).size == (24, 40)


class TestColours:
    def test_black_on_transparent(self):
        pixels = np.zeros((24, 40, 4), np.uint8)
        pixels[5:9, :, 3] = 255
        Image.fromarray(pixels).save("rgba.png")
        Image.fromarray(pixels[..., 2:]).save("la.png")
        dark = pixels + np.array([3, 0, 6, 0], np.uint8) * (pixels[..., 3:] > 0)
        Image.fromarray(dark.astype(np.uint8)).save("dark.png")
        # Two entries of the palette are black, and one of them is transparent.
        palette = Image.fromarray(pixels[..., 3] // 255, "P")
        palette.putpalette(bytes(6))
        palette.save("index.png", transparency=0)
        palette.save("bytes.png", transparency=bytes([0, 255]))
        palette.save("a.gif", transparency=0)
        for name in ("rgba.png", "la.png", "dark.png", "index.png", "bytes.png", "a.gif"):
            assert [kind for kind, _ in notes(name)] == ["transparent"], name
            assert np.ptp(np.asarray(decode(Path(name)))) < 8

    def test_what_is_seen_without_transparency_is_silent(self):
        rgba = NOISE.convert("RGBA")
        rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
        rgba.save("seen.png")
        Image.new("RGBA", (9, 9), (1, 2, 3, 200)).save("one.png")
        NOISE.quantize(16).save("palette.png", transparency=3)
        Image.new("L", (9, 9)).save("black.png")
        for name in ("seen.png", "one.png", "palette.png", "black.png"):
            assert notes(name) == [], name

    @pytest.mark.parametrize(
        ("values", "ending", "detail"),
        [
            (np.array([[0, 4095]], np.uint16), "png", "values from 0 to 4095"),
            (np.array([[300, 60000]], np.uint16), "tif", "values from 300 to 60000"),
            (np.array([[-5, 7]], np.int32), "tif", "values from -5 to 7"),
            (np.array([[0, 0.5, 1]], np.float32), "tif", "values from 0 to 1"),
            (np.array([[0, 255]], np.uint16), "png", None),
            (np.array([[0, 200.5]], np.float32), "tif", None),
            (np.array([[7, 7]], np.float32), "tif", None),
        ],
    )
    def test_more_than_eight_bits(self, values, ending, detail):
        Image.fromarray(values).save(f"a.{ending}")
        assert notes(f"a.{ending}") == ([("deep", detail)] if detail else [])


class TestPages:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_of_a_scan(self, count):
        pages = [Image.new("1", (40, 30), number % 2) for number in range(count)]
        pages[0].save("a.tif", save_all=True, append_images=pages[1:])
        found = [] if count == 1 else [("pages", f"{count} pages, the first is read")]
        assert notes("a.tif") == found

    @pytest.mark.parametrize("ending", ["gif", "webp", "png"])
    def test_of_an_animation(self, ending):
        frames = [Image.new("RGB", (8, 8), (60 * number, 0, 0)) for number in range(3)]
        frames[0].save(f"a.{ending}", save_all=True, append_images=frames[1:])
        assert notes(f"a.{ending}") == [("pages", "an animation, the first frame is read")]
        frames[0].save(f"one.{ending}")
        assert notes(f"one.{ending}") == []

    def test_endless_pages_are_counted_to_a_bound(self, monkeypatch):
        monkeypatch.setattr(image_notes, "MOST_PAGES_COUNTED", 3)
        pages = [Image.new("1", (4, 4)) for _ in range(9)]
        pages[0].save("a.tif", save_all=True, append_images=pages[1:])
        assert notes("a.tif") == [("pages", "3 pages or more, the first is read")]

    def test_a_further_page_that_is_damaged_refuses_nothing(self):
        pages = [Image.new("L", (40, 30), number) for number in range(2)]
        pages[0].save("a.tif", save_all=True, append_images=pages[1:])
        content = Path("a.tif").read_bytes()
        Path("a.tif").write_bytes(content[: len(content) - 40])
        assert inspect_image(Path("a.tif")).size == (40, 30)


class TestDecoders:
    def damaged_tag(self, name: str) -> None:
        """A TIFF with a tag whose data would lie behind the end of the file."""
        NOISE.save(name, tiffinfo={65000: "x" * 20})
        content = bytearray(Path(name).read_bytes())
        at = content.index(struct.pack("<HH", 65000, 2))
        content[at + 4 : at + 8] = struct.pack("<I", 10**6)
        Path(name).write_bytes(content)

    def test_each_file_gets_its_own_warnings_and_stderr_none(self, capfd):
        for number in range(12):
            self.damaged_tag(f"{number}.tif")
            NOISE.save(f"{number}.png")
        paths = [Path(f"{number}.{ending}") for number in range(12) for ending in ("tif", "png")]
        found = inspect_images(paths)
        said = {str(path): [note.detail for note in facts.notes] for path, facts in found.items()}
        line = "Tag data larger than file. Skipping tag 65000"
        assert said == {str(p): [line] if p.suffix == ".tif" else [] for p in paths}
        for path in paths:
            decode(path)
        assert "Tag data" not in capfd.readouterr().err
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)

    @pytest.mark.skipif(not features.check("libtiff"), reason="Pillow without libtiff")
    def test_lines_of_libtiff(self, capfd):
        Image.effect_noise((200, 100), 90).convert("1").save("a.tif", compression="group4")
        content = bytearray(Path("a.tif").read_bytes())
        content[200:230] = RNG.integers(0, 256, 30, dtype=np.uint8).tobytes()
        Path("a.tif").write_bytes(content)
        [(kind, detail)] = notes("a.tif")
        assert kind == "damaged"
        assert detail.startswith("Fax4Decode: ")
        decode(Path("a.tif"))
        assert capfd.readouterr().err == ""
        # Others, like a program that uses vlft, still get them.
        with Image.open("a.tif") as image:
            image.load()
        assert detail in capfd.readouterr().err

    def test_lines_of_pillows_logger(self, capfd, monkeypatch):
        # Those of pytest would take them.
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        NOISE.save("a.tif")
        content = bytearray(Path("a.tif").read_bytes())
        # 60,000 samples a pixel; the three that are described are read all the same.
        at = content.index(struct.pack("<HHI", 277, 3, 1))
        content[at + 8 : at + 10] = struct.pack("<H", 60_000)
        Path("a.tif").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.tif: not a whole image"):
            inspect_image(Path("a.tif"))
        assert capfd.readouterr().err == ""

    def test_large_and_allowed_is_no_warning(self, capfd):
        Image.new("1", (10_000, 9_000)).save("a.png")
        assert notes("a.png") == []
        assert capfd.readouterr().err == ""


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "found"),
        [
            (b"", "an empty file"),
            (b"\n <!doctype HTML><p>503", "an HTML page"),
            (b"\xef\xbb\xbf<html lang=en>", "an HTML page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
            (b"%PDF-1.7\n", "a PDF"),
            (b"<?xml version='1.0'?>\n<!-- x --><svg xmlns='x'/>", "an SVG drawing"),
            (b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML, perhaps the error of a"),
            (b'{"message": "rate limit"}', "JSON, perhaps the error of a download"),
            (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIC"),
            (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
            (bytes(128) + b"DICM", "a DICOM file"),
            (bytes(2000), "zeros alone"),
            (b"\xff\xd8\xff\xe0\0", "not a whole image (its first bytes are cut off or damaged)"),
            (b"hello", "not an image of a known format"),
        ],
    )
    def test_a_file_that_is_no_image_is_named(self, content, found):
        Path("a.jpg").write_bytes(content)
        with pytest.raises(DataError) as error:
            inspect_image(Path("a.jpg"), place="b.jsonl:2")
        assert str(error.value).startswith(f"b.jsonl:2: a.jpg: {found}")
        assert error.value.hint

    def test_names_stand_for_what_the_whole_file_is(self):
        assert what_it_is(b"", 0) != what_it_is(b"\0", 1)

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
    def test_only_regular_files_are_opened(self, make):
        make("a.png")
        with pytest.raises(DataError, match=r"a\.png: cannot be read \(not a regular file\)"):
            inspect_image(Path("a.png"))
        with pytest.raises(DataError, match="not a regular file"):
            decode(Path("/dev/zero"))

    def test_too_many_pixels(self):
        write_png("a.png", 16_000, 16_000)
        with pytest.raises(DataError) as error:
            inspect_image(Path("a.png"))
        assert str(error.value) == (
            "a.png: 16,000 x 16,000 pixels, at most 178,956,970 are read\n"
            " hint: make the image smaller"
        )

    def test_a_side_that_no_resize_can_take(self):
        write_png("a.png", 1_000_001, 1)
        with pytest.raises(DataError, match="1,000,001 x 1 pixels, at most 1,000,000 on a side"):
            inspect_image(Path("a.png"))

    def test_a_file_too_large_is_not_read(self, monkeypatch):
        monkeypatch.setattr(images, "LARGEST_FILE", 2**20)
        NOISE.save("a.png")
        os.truncate("a.png", 3 * 2**30)
        with pytest.raises(DataError, match="3 GiB, at most 0 GiB are read"):
            inspect_image(Path("a.png"))

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    @pytest.mark.parametrize("kind", ["data:image/png;base64,", ""])
    def test_an_embedded_image_that_is_too_large(self, monkeypatch, kind):
        monkeypatch.setattr(embedded, "LARGEST", 3000)
        monkeypatch.setattr(references, "LONGEST_TEXT", 4500)
        for size, found in ((3001, "of 0 MiB, at most 0 are read"), (30_000, "of 0 MiB, at most")):
            text = kind + base64.b64encode(bytes(size)).decode()
            with pytest.raises(DataError, match=f"an embedded image {found}"):
                references.image_refs(text, "images", Path())
        [ref] = references.image_refs(kind + base64.b64encode(bytes(2999)).decode(), "", Path())
        assert ref.path.stat().st_size == 2999

    @pytest.mark.parametrize(
        ("parts", "line"),
        [
            (['{"query": "a"}\n\n{"images": "', 9000 * "A", '"}\n'], 3),
            (['[{"query": "', 6000 * "é", '"}]'], 1),
            (["\ufeff\n{'a", 9000 * "b", "\n"], 2),
        ],
    )
    @pytest.mark.parametrize("chunk", [10, 100, 7000])
    def test_a_text_that_is_too_long_is_not_read(self, monkeypatch, parts, line, chunk):
        monkeypatch.setattr(text, "LONGEST_TEXT", 8000)
        monkeypatch.setattr(text, "CHUNK", chunk)
        Path("a.jsonl").write_text("".join(parts), "utf-8")
        with pytest.raises(DataError, match=rf"^a\.jsonl:{line}: a text of more than 0 MiB"):
            text.open_text(Path("a.jsonl"))

    @pytest.mark.parametrize("content", [3000 * '{"a": "b"}\n', 9000 * "a,b\n", 9000 * '"a"\n'])
    @pytest.mark.parametrize("chunk", [100, 2**20])
    def test_a_long_file_of_short_texts_is_read(self, monkeypatch, content, chunk):
        monkeypatch.setattr(text, "LONGEST_TEXT", 8000)
        monkeypatch.setattr(text, "CHUNK", chunk)
        Path("a.jsonl").write_text(content)
        with text.open_text(Path("a.jsonl")) as file:
            assert file.read().decode() == content

    def test_bombs_cost_neither_time_nor_memory(self):
        """In a process of its own: less than two seconds each, less than 300 MB in all."""
        write_png("huge.png", 50_000, 50_000)
        write_png("thin.png", 70_000_000, 1)
        write_gif("long.gif", 100_000)
        with Path("long.jsonl").open("wb") as file:
            file.write(b'{"query": "What?", "response": "x", "images": "')
            for _ in range(1024):
                file.write(2**20 * b"A")
            file.write(b'"}\n')
        program = """if 1:
            import re, sys, time
            from pathlib import Path
            from vlft.data.images import inspect_image
            from vlft.errors import DataError
            from vlft.data.containers.text import open_text
            for name in sys.argv[1:]:
                before = time.process_time()
                try:
                    if name.endswith(".jsonl"):
                        open_text(Path(name))
                    said = inspect_image(Path(name)).notes[0].detail
                except DataError as error:
                    said = str(error)
                assert time.process_time() - before < 2, name
                print(said.splitlines()[0])
            print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
        """
        names = ["huge.png", "thin.png", "long.gif", "long.jsonl"]
        lines = subprocess.check_output([sys.executable, "-c", program, *names], text=True)
        huge, thin, long, encoded, kilobytes = lines.splitlines()
        assert huge.startswith("huge.png: 50,000 x 50,000 pixels, at most")
        assert thin.startswith("thin.png: 70,000,000 x 1 pixels, at most")
        assert long == "an animation, the first frame is read"
        assert encoded == "long.jsonl:1: a text of more than 150 MiB"
        Path("long.jsonl").unlink()
        assert int(kilobytes) < 300_000


def write_png(path: str, width: int, height: int) -> None:
    """The head of a PNG of this size, without the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", b""), chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_gif(path: str, frames: int) -> None:
    """An animation of frames of one pixel."""
    head = b"GIF89a\1\0\1\0\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\4\0\1\0\0\0" + b"\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    Path(path).write_bytes(head + frames * frame + b";")


def test_heic_is_read_upright_with_the_extra():
    heif = pytest.importorskip("pillow_heif", reason="the extra vlft[heif]")
    upright = Image.new("RGB", (96, 64), "white")
    upright.paste("black", (0, 0, 32, 32))
    # A camera that was held on its side stores this.
    stored = heif.from_pillow(upright.transpose(Image.Transpose.ROTATE_90))
    stored.save("a.heic", exif=with_orientation(6).tobytes(), quality=90)
    for rotate in (False, True):
        assert notes("a.heic", rotate=rotate) == []
        facts = inspect_image(Path("a.heic"), rotate=rotate)
        image = decode(Path("a.heic"), rotate=rotate)
        assert facts.size == image.size == upright.size
        assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 5


class TestRuns:
    def write(self, name: str, files: list[str]) -> None:
        rows = [{"query": "What?", "response": "x", "images": [file]} for file in files]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, **settings: object) -> Path:
        return vlft.sft(SftConfig(
            model=str(SIGLIP.folder), dataset=("a.jsonl",), output_dir=Path("out"), max_steps=1,
            val_ratio=0, show_sample=False, **settings,
        )).run  # fmt: skip

    def test_notes_and_skipped_records_are_listed_in_the_run(self, capfd):
        turned = with_orientation(8)
        for name in ("1.jpg", "2.jpg"):
            NOISE.save(name, exif=turned)
        Path("cut.jpg").write_bytes(Path("1.jpg").read_bytes()[:1000])
        self.write("a.jsonl", ["1.jpg", "2.jpg", "1.jpg", "cut.jpg", "no.jpg", "neither.jpg"])
        run = self.run(on_bad_sample="skip")
        rows = [json.loads(line) for line in (run / "image_notes.jsonl").read_text().splitlines()]
        assert rows == [
            {
                "record": f"a.jsonl:{line}",
                "image": f"{line}.jpg",
                "kind": "turned",
                "detail": "EXIF orientation 8",
            }
            for line in (1, 2)
        ]
        skipped = (run / "skipped_records.jsonl").read_text().splitlines()
        assert [json.loads(line)["record"] for line in skipped] == [
            "a.jsonl:4: cut.jpg", "a.jsonl:5: no.jpg", "a.jsonl:6: neither.jpg",
        ]  # fmt: skip
        err = capfd.readouterr().err
        assert (
            "warning: 2 images: EXIF says how to turn them, which the authors' code does for "
            "DeepSeek-OCR alone; --exif rotate turns them (the first: a.jsonl:1: 1.jpg: EXIF "
            "orientation 8)\n"
        ) in err
        assert (
            "warning: skipped 3 bad records (2 no such image, 1 not a whole image), the first: "
            "a.jsonl:4: cut.jpg: not a whole image ("
        ) in err
        assert "hint" not in err
        assert f"records that were skipped: 3, see {run}" in err
        checked = {"dataset": ("a.jsonl",), "on_bad_sample": "skip"}
        run_check(CheckConfig(**checked))
        assert "warning: 2 images: EXIF says" in capfd.readouterr().err
        run_check(CheckConfig(**checked, json=True))
        assert json.loads(capfd.readouterr().out)["image_notes"] == rows

    def test_exif_is_stored_with_the_run_and_infer_follows(self, capfd):
        upright = NOISE.resize((40, 8))
        upright.save("upright.png")
        upright.transpose(Image.Transpose.ROTATE_90).save("stored.png", exif=with_orientation(6))
        self.write("a.jsonl", ["upright.png"])
        expected = self.run()
        self.write("a.jsonl", ["stored.png"])
        rotated = self.run(exif="rotate")
        assert "EXIF" not in capfd.readouterr().err
        losses = [
            json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
            for run in (expected, rotated)
        ]
        assert losses[0] == losses[1]
        vlft.infer(InferConfig(
            ckpt_dir=rotated, dataset=("a.jsonl",), max_new_tokens=1, output=Path("b.jsonl")
        ))  # fmt: skip
        header = json.loads(Path("b.settings.json").read_text())
        assert header["settings"]["exif"] == "rotate"
        assert header["image_notes"] == []
        # A merged model turns them, too; the other did not.
        merged = vlft.merge_lora(MergeLoraConfig(ckpt_dir=rotated, output_dir=Path("merged")))
        assert "trained with --exif rotate" in capfd.readouterr().err
        assert locate_model(str(merged.folder)).processor().pixels.rotate
        assert not locate_model(str(SIGLIP.folder)).processor().pixels.rotate


def test_the_limits_in_the_docs_are_those_of_the_code():
    text = " ".join((Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8").split())
    limits = download.Limits()
    for line in (
        f"{images.MOST_PIXELS:,} pixels",
        f"{images.LONGEST_SIDE:,} pixels on a side and {images.LARGEST_FILE // 2**30} GiB",
        f"{images.PIXELS_IN_FLIGHT:,} pixels together, {images.PIXELS_IN_FLIGHT * 4 // 2**20} MiB",
        f"An embedded image has at most {embedded.LARGEST // 2**20} MiB",
        f"At most {limits.size // 2**20} MiB and {limits.redirects} redirects an image, "
        f"{limits.silence:.0f} seconds without a byte and {limits.total:.0f} seconds in all. It is "
        f"tried {limits.attempts} times",
    ):
        assert line in text, line
    with pytest.raises(Image.DecompressionBombError):
        Image._decompression_bomb_check((images.MOST_PIXELS + 1, 1))
