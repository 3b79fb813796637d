"""``vlft infer --image``: images and PDF pages in, results and text files out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, OCR, SIGLIP
from PIL import Image

import vlft
from vlft.data import pdf
from vlft.data.documents import Pages, open_documents
from vlft.errors import CheckpointError, ConfigError, DataError, UsageError
from vlft.files import cache_folder
from vlft.inference import replier, side_by_side
from vlft.inference.replier import Replier, Reply
from vlft.inference.saved_text import file_names

PHOTOS = GOLDEN / "images"


def pdf_bytes(*texts: str, size: tuple[int, int] = (144, 72)) -> bytes:
    """A PDF file with a page for each text."""
    pages = range(len(texts))
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in pages)
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(texts)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(texts):
        stream = f"BT /F1 24 Tf 10 30 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {size[0]} {size[1]}] /Contents "
            f"{5 + 2 * number} 0 R /Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    out, starts = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        starts.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{start:010} 00000 n \n" for start in starts)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF"
    return out + (end + trailer).encode()


@pytest.fixture
def pdfium():
    return pytest.importorskip("pypdfium2", reason="the extra vlft[pdf]")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with three images, two of one name."""
    monkeypatch.chdir(tmp_path)
    for name, photo in (
        ("a.jpg", "photo_a"),
        ("scans/p10.jpg", "photo_b"),
        ("scans/p2.jpg", "chart"),
    ):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        source = next(PHOTOS.glob(f"{photo}.*"))
        Image.open(source).convert("RGB").save(target)
    return tmp_path


@pytest.fixture
def replies(monkeypatch):
    """Replies without a model: ``reply N`` to the Nth question; the list of what was asked."""
    asked = []

    def text(prompt):
        if len(asked) == stop_at[0]:
            raise KeyboardInterrupt
        asked.append(prompt)
        return f"<|ref|>text<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>\nreply {len(asked)}"

    stop_at = [None]
    reply_without_model(monkeypatch, text)
    return asked, stop_at


def reply_without_model(monkeypatch, text):
    """Replies are what ``text`` makes of a prompt."""

    def generate(_replier, prompts, _seeds, numbers, *_args):
        return [Reply(text(prompts[number]), [1], "stop") for number in numbers]

    prepared = SimpleNamespace(inputs=lambda _numbers: {})
    monkeypatch.setattr(Replier, "_generate", generate)
    monkeypatch.setattr(replier, "SharedPrompts", lambda *_: prepared)
    monkeypatch.setattr(side_by_side, "load_for_inference", lambda *_: None)


def read(*image, case=SIGLIP, **settings):
    given = {"show_samples": 0, "device": "cpu", "query": "<image>Read it.", **settings}
    return vlft.infer(vlft.InferConfig(model=str(case.folder), image=image, **given))


def test_a_tiny_model_reads_files_and_patterns(here):
    """The whole way with a model, for an OCR family: the texts are the replies."""
    result = read(
        "a.jpg", "scans/*.jpg", case=OCR, query=r"<image>\nFree OCR.", image_mode="tiny",
        max_new_tokens=4, save_text=here / "text",
    )  # fmt: skip
    rows = result.rows
    assert [row["query"] for row in rows] == ["<image>\nFree OCR."] * 3
    # p2 is before p10.
    assert [row["id"] for row in rows] == ["a.jpg", "scans/p2.jpg", "scans/p10.jpg"]
    assert [row["images"] for row in rows] == [[str(here / row["id"])] for row in rows]
    for row in rows:
        saved = here / "text" / row["id"].replace(".jpg", ".md")
        assert saved.read_text() == row["response"] + "\n"
    assert len(list((here / "text").rglob("*.md"))) == 3


def test_pages_of_a_pdf_file(here, replies, pdfium):
    (here / "b.pdf").write_bytes(pdf_bytes("one", "two", "three"))
    result = read("b.pdf", "a.jpg", pdf_dpi=100, save_text=here / "text", format="markdown")
    rows = result.rows
    assert [row["id"] for row in rows] == [*(f"b.pdf#page={n}" for n in (1, 2, 3)), "a.jpg"]
    assert rows[1]["meta"] == {"document": "b.pdf", "page": 2, "pages": 3}
    with Image.open(rows[0]["images"][0]) as page:
        assert page.size == (200, 100)
        # There is ink on it.
        assert page.convert("L").getextrema() == (0, 255)
    text = "reply 1\n\n<!-- page 2 -->\n\nreply 2\n\n<!-- page 3 -->\n\nreply 3\n"
    assert (here / "text" / "b.md").read_text() == text
    assert (here / "text" / "a.md").read_text() == "reply 4\n"


def test_a_page_is_rendered_once(here, replies, pdfium, monkeypatch):
    (here / "b.pdf").write_bytes(pdf_bytes("one", "two"))
    first = read("b.pdf", output=here / "1.jsonl").rows
    monkeypatch.setattr(pdfium.PdfPage, "render", lambda *_args, **_kwargs: pytest.fail("rendered"))
    assert [r["images"] for r in read("b.pdf", output=here / "2.jsonl").rows] == [
        row["images"] for row in first
    ]


@pytest.fixture
def drawn(pdfium, monkeypatch):
    """The pages, from 0, that are drawn, in order."""
    found, draw = [], pdf._draw

    def noted(document, number, *args):
        found.append(number)
        draw(document, number, *args)

    monkeypatch.setattr(pdf, "_draw", noted)
    return found


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_page_is_drawn_when_its_batch_is_answered(here, replies, drawn, monkeypatch, batch_size):
    # Of a size of its own: no page is in the cache.
    size = (150 + batch_size, 72)
    (here / "b.pdf").write_bytes(pdf_bytes("one", "two", "three", "four", size=size))
    generate, before = Replier._generate, []

    def noted(*args):
        before.append(list(drawn))
        return generate(*args)

    monkeypatch.setattr(Replier, "_generate", noted)
    read("b.pdf", batch_size=batch_size)
    ends = range(batch_size, 5, batch_size)
    assert before == [list(range(end)) for end in ends]


def test_a_stopped_run_draws_the_pages_that_are_left(here, replies, drawn):
    (here / "b.pdf").write_bytes(pdf_bytes("one", "two", "three", size=(156, 72)))
    asked, stop_at = replies
    stop_at[0] = 1
    with pytest.raises(KeyboardInterrupt):
        read("b.pdf", batch_size=1)
    assert drawn == [0, 1]
    stop_at[0] = None
    for page in (cache_folder("images") / "pages").iterdir():
        page.unlink()
    assert len(read("b.pdf", batch_size=1).rows) == 3
    assert drawn == [0, 1, 1, 2]
    assert len(asked) == 3


def test_memory_does_not_grow_with_the_pages(here, pdfium):
    """A page of 1,000 x 1,000 pixels is 3 MB as an image, and as much as a bitmap."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("the resident memory is read from /proc")
    (here / "b.pdf").write_bytes(pdf_bytes(*"abcdefghijklmnopqrst", size=(1000, 1000)))
    (document,) = open_documents(["b.pdf"], 72, strict=True)
    pages, resident = Pages([document]), []
    for page in document.pages:
        pages.draw([page])
        resident.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    assert max(resident[4:]) - min(resident[4:]) < 10


@pytest.mark.parametrize(
    "change", [b"", b"/Rotate 90 ", b"/UserUnit 2 ", b"/CropBox [9.7 8 99 66] "]
)
def test_the_size_of_a_page_is_known_before_it_is_drawn(here, pdfium, change):
    box = b"/MediaBox [0 0 144.37 72.91]"
    data = pdf_bytes("one").replace(b"/MediaBox [0 0 144 72]", change + box)
    (here / "b.pdf").write_bytes(data)
    for dpi in (73, 200):
        (document,) = open_documents(["b.pdf"], dpi, strict=True)
        pages = Pages([document])
        pages.draw(document.pages)
        for path in document.pages:
            with Image.open(path) as image:
                assert pages.inspected[path].size == image.size


def test_a_pdf_file_that_changes_while_it_is_read(here, replies, pdfium, monkeypatch):
    path = here / "b.pdf"
    data = pdf_bytes("one", "two", "three", size=(162, 72))
    path.write_bytes(data)
    generate = Replier._generate

    def changing(change):
        def generate_after(*args):
            change()
            return generate(*args)

        monkeypatch.setattr(Replier, "_generate", generate_after)

    changing(lambda: path.write_bytes(pdf_bytes("four", size=(162, 72))))
    with pytest.raises(DataError, match=r"b\.pdf: has changed since it was opened"):
        read("b.pdf", batch_size=1)
    path.write_bytes(data)
    changing(lambda: path.unlink())
    with pytest.raises(DataError, match=r"b\.pdf: no longer there"):
        read("b.pdf", batch_size=1)
    # The same bytes in a new file are no change.
    path.write_bytes(data)
    changing(lambda: path.write_bytes(data))
    assert [row["id"] for row in read("b.pdf", batch_size=1).rows] == [
        f"b.pdf#page={number}" for number in (1, 2, 3)
    ]


@pytest.fixture
def by_pages(monkeypatch):
    """Replies to several pages, which Unlimited-OCR marks; the list of what was asked."""
    asked = []

    def text(prompt):
        asked.append(prompt)
        pages = [f"<|det|>text [0, 0, 999, 999]<|/det|>{n}" for n in range(len(prompt.images))]
        return f"<PAGE>{'<PAGE>'.join(pages)}"

    reply_without_model(monkeypatch, text)
    return asked


def test_several_pages_in_one_prompt(here, by_pages, pdfium):
    (here / "b.pdf").write_bytes(pdf_bytes("one", "two", "three"))
    given = {"save_text": here / "text", "format": "blocks", "pages_per_prompt": 2, "pdf_dpi": 72}
    rows = read("b.pdf", "a.jpg", **given).rows
    assert [row["query"] for row in rows] == ["<image><image>Read it.", *["<image>Read it."] * 2]
    assert [row["id"] for row in rows] == ["b.pdf#page=1-2", "b.pdf#page=3", "a.jpg"]
    last = [2, None, None]
    assert [row["meta"].get("last_page") for row in rows] == last
    assert [row["meta"]["page"] for row in rows] == [1, 3, 1]
    assert [len(row["images"]) for row in rows] == [2, 1, 1]
    assert [(b["page"], b["boxes"], b["text"]) for b in rows[0]["blocks"]] == [
        (1, [[0, 0, 144, 72]], "0"), (2, [[0, 0, 144, 72]], "1"),
    ]  # fmt: skip
    assert rows[0]["markdown"] == "0\n\n<PAGE>\n\n1"
    assert "page" not in rows[1]["blocks"][0]
    text = "0\n\n<!-- page 2 -->\n\n1\n\n<!-- page 3 -->\n\n0\n"
    assert (here / "text" / "b.md").read_text() == text
    assert len(by_pages) == 3
    # The same command again finds every page answered. Other pages in a prompt are other records.
    read("b.pdf", "a.jpg", **given)
    assert len(by_pages) == 3
    with pytest.raises(CheckpointError, match="line 1 answers another record"):
        read("b.pdf", "a.jpg", **{**given, "pages_per_prompt": 3})


def test_pages_that_a_reply_does_not_tell_apart_stay_together(here, replies, pdfium):
    (here / "b.pdf").write_bytes(pdf_bytes("one", "two", "three"))
    read("b.pdf", pages_per_prompt=2, format="markdown", save_text=here / "text")
    assert (here / "text" / "b.md").read_text() == "reply 1\n\n<!-- page 3 -->\n\nreply 2\n"


def test_models_of_one_page_are_not_asked_about_several(here, replies):
    message = "--pages-per-prompt: found 2; DeepSeek-OCR was trained on one page"
    with pytest.raises(ConfigError, match=message):
        read("a.jpg", case=OCR, pages_per_prompt=2)


def test_blocks_have_pixels_of_the_page(here, replies):
    row = read("a.jpg", format="blocks").rows[0]
    with Image.open("a.jpg") as image:
        box = [0, 0, *image.size]
    assert row["blocks"] == [{"type": "text", "boxes": [box], "text": "reply 1"}]
    assert row["markdown"] == "reply 1"
    assert row["response"].startswith("<|ref|>")
    # What was made of the reply is no data.
    again = vlft.infer(
        vlft.InferConfig(
            model=str(SIGLIP.folder), dataset=("output/infer/deepseek-vl-siglip-documents.jsonl",),
            output=here / "again.jsonl", show_samples=0, device="cpu",
        )
    ).rows[0]  # fmt: skip
    assert "blocks" not in again
    assert again["images"] == row["images"]


def test_a_stopped_run_goes_on_and_has_no_half_documents(here, replies, pdfium):
    asked, stop_at = replies
    (here / "b.pdf").write_bytes(pdf_bytes("one", "two", "three"))
    stop_at[0] = 3
    given = {"save_text": here / "text", "batch_size": 1, "format": "markdown"}
    with pytest.raises(KeyboardInterrupt):
        read("a.jpg", "b.pdf", **given)
    assert sorted(path.name for path in (here / "text").iterdir()) == [".vlft", "a.md"]
    stop_at[0] = None
    (here / "text" / ".b.md.0123abcd.part").write_text("what a kill has left")
    read("a.jpg", "b.pdf", **given)
    assert len(asked) == 4
    assert (here / "text" / "b.md").read_text().count("reply") == 3
    assert sorted(path.name for path in (here / "text").iterdir()) == [
        ".vlft", "a.md", "b.md"
    ]  # fmt: skip


def test_files_of_others_are_not_replaced(here, replies):
    target = here / "text" / "a.md"
    target.parent.mkdir()
    target.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"a\.md: is there, and vlft has not written it"):
            read("a.jpg", save_text=here / "text", overwrite=overwrite)
    assert target.read_text() == "mine"
    assert replies[0] == []
    target.unlink()
    for kind in ("link", "folder"):
        target.symlink_to("nowhere") if kind == "link" else target.mkdir()
        with pytest.raises(ConfigError, match=r"a\.md: is there, and vlft has not written it"):
            read("a.jpg", save_text=here / "text", overwrite=True)
        target.unlink() if kind == "link" else target.rmdir()
    read("a.jpg", save_text=here / "text", overwrite=True, format="markdown")
    assert target.read_text() == "reply 1\n"
    (here / "output" / "infer").rename(here / "before")
    with pytest.raises(ConfigError, match=r"a\.md: is there already\n hint: .*--overwrite"):
        read("a.jpg", save_text=here / "text", format="markdown")
    read("a.jpg", save_text=here / "text", overwrite=True, format="markdown")
    assert target.read_text() == "reply 2\n"


def test_a_document_that_cannot_be_read_is_an_error_or_left_out(here, replies, pdfium, caplog):
    (here / "b.pdf").write_bytes(b"%PDF-1.4\nnothing else")
    (here / "c.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"b\.pdf: not a whole PDF file"):
        read("a.jpg", "b.pdf")
    with pytest.raises(DataError, match=r"c\.png: .*not an image"):
        read("a.jpg", "c.png")
    result = read("a.jpg", "b.pdf", "c.png", on_bad_sample="skip", save_text=here / "text")
    assert [row["id"] for row in result.rows] == ["a.jpg"]
    assert [path.name for path in (here / "text").glob("*.md")] == ["a.md"]


def test_pdf_files_that_are_refused(here, pdfium):
    (here / "large.pdf").write_bytes(pdf_bytes("x", size=(9000, 9000)))
    with pytest.raises(DataError, match=r"large\.pdf, page 1: 25,000 x 25,000 pixels at 200 dpi"):
        open_documents(["large.pdf"], 200, strict=True)
    (here / "torn.pdf").write_bytes(pdf_bytes("x", "y").replace(b"6 0 R", b"9 0 R", 1))
    with pytest.raises(DataError, match=r"torn\.pdf, page 2: cannot be read"):
        open_documents(["torn.pdf"], 200, strict=True)
    (here / "empty.pdf").write_bytes(pdf_bytes())
    with pytest.raises(DataError, match=r"empty\.pdf: (has no pages|not a whole PDF file)"):
        open_documents(["empty.pdf"], 200, strict=True)


def test_without_pypdfium2_images_are_read_and_pdf_files_say_what_to_install(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    assert [str(d.path) for d in open_documents(["a.jpg"], 200, strict=True)] == ["a.jpg"]
    (here / "b.pdf").write_bytes(pdf_bytes("one"))
    with pytest.raises(ConfigError, match=r"pip install 'vlft\[pdf\]'"):
        open_documents(["b.pdf"], 200, strict=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none.png", "none.png: no such file"),
        ("x/*.png", r"x/\*.png: matches no file"),
        ("scans", "scans: found a folder\n hint: write 'scans/\\*'"),
        ("https://a.example/b.png", "--image: found 'https://a.example/b.png'; files are allowed"),
    ],
)
def test_names_that_are_no_files(here, given, message):
    with pytest.raises(DataError, match=message):
        open_documents([given], 200, strict=True)


def test_a_document_that_is_named_twice_is_read_once(here):
    found = open_documents(["a.jpg", "*.jpg"], 200, strict=True)
    assert [str(document.path) for document in found] == ["a.jpg"]


def test_text_files_have_different_names(here):
    paths = [here / name for name in ("d/a.jpg", "d/a.PDF", "d/e/a.jpg", "d/b.tar.png")]
    assert list(file_names(paths).values()) == ["a.jpg.md", "a.PDF.md", "e/a.md", "b.tar.md"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query": None}, "--query: nothing is asked about the images"),
        ({"query": " "}, "--query: nothing is asked about the images"),
        ({"dataset": ("a.jsonl",)}, "--image: found together with --dataset"),
        ({"layout": "query"}, "--layout: only for records of data files, found --image"),
        ({"image_root": "."}, "--image-root: only for records of data files, found --image"),
        ({"image": (), "dataset": ("a",), "pdf_dpi": 100}, "--pdf-dpi: only for --image"),
        ({"image": (), "query": None, "format": "blocks"}, "--format: only for answers"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    given = {"model": "m", "image": ("a.jpg",), "query": "Read it.", **settings}
    if not given["image"] and "pdf_dpi" in settings:
        given["query"] = None
    with pytest.raises(UsageError, match=message):
        vlft.infer(vlft.InferConfig(**given))


def test_at_the_command_line(here, replies):
    from vlft.cli.commands import COMMANDS
    from vlft.cli.options import read_settings
    from vlft.config import InferConfig

    words = ["--model", str(SIGLIP.folder), "--image", "a.jpg", "scans/*.jpg", "--query"]
    words += [r"<image>\nRead.", "--device", "cpu", "--show-samples", "1", "--output", "o.jsonl"]
    COMMANDS["infer"].run(*read_settings(InferConfig, "infer", words))
    rows = [json.loads(line) for line in (here / "o.jsonl").read_text().splitlines()]
    assert [row["query"] for row in rows] == ["<image>\nRead."] * 3
    header = json.loads((here / "o.settings.json").read_text())
    assert [name.rpartition("/")[2] for name in header["documents"]] == [
        "a.jpg",
        "p2.jpg",
        "p10.jpg",
    ]
    shutil.rmtree(here / "scans")
