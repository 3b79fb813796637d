"""The reader of OCR replies: blocks, markdown, and damaged text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlft.data.ocr_blocks import Block, read_blocks, split_pages, without_tags

PAGE = """<|ref|>title<|/ref|><|det|>[[125, 60, 500, 99]]<|/det|>
# The heading

<|ref|>image<|/ref|><|det|>[[0, 100, 999, 300]]<|/det|>

<|ref|>text<|/ref|><|det|>[[125, 140, 500, 874], [510, 140, 900, 300]]<|/det|>
A paragraph with <td> and 1 < 2.

Its second part."""


def test_blocks_have_their_type_their_boxes_in_pixels_and_their_text():
    # int(n / 999 * pixels), as the authors' code draws them.
    assert read_blocks(PAGE, (2000, 1000)) == [
        Block("title", [[250, 60, 1001, 99]], "# The heading"),
        Block("image", [[0, 100, 2000, 300]], ""),
        Block(
            "text",
            [[250, 140, 1001, 874], [1021, 140, 1801, 300]],
            "A paragraph with <td> and 1 < 2.\n\nIts second part.",
        ),
    ]


def test_markdown_has_the_text_alone():
    text = "# The heading\n\nA paragraph with <td> and 1 < 2.\n\nIts second part."
    assert without_tags(PAGE) == text


def test_a_reply_without_tags_is_text():
    assert without_tags("| a | b |\n|---|---|") == "| a | b |\n|---|---|"
    assert read_blocks("free text", (10, 10)) == [Block("", [], "free text")]
    assert read_blocks("", (10, 10)) == []


def test_located_texts_are_the_text_where_there_is_no_other():
    reply = "<|ref|>total<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>\n<|ref|>3.40<|/ref|>"
    assert without_tags(reply) == "total\n3.40"


def test_unlimited_ocr_names_the_type_within_the_box():
    reply = "<|det|>title [0, 0, 999, 999]<|/det|>Heading<|det|>text [0, 0, 1, 1]<|/det|>More"
    assert read_blocks(reply, (50, 60)) == [
        Block("title", [[0, 0, 50, 60]], "Heading"),
        Block("text", [[0, 0, 0, 0]], "More"),
    ]


@pytest.mark.parametrize(
    ("reply", "pages"),
    [
        ("<PAGE>a\n<PAGE>b", ["a\n", "b"]),
        ("a<PAGE>b<PAGE>\n", ["a", "b"]),
        ("a", ["a"]),
        ("<PAGE>", [""]),
        ("", [""]),
    ],
)
def test_pages_of_a_reply(reply, pages):
    """Marked at their start or at their end."""
    assert split_pages(reply) == pages
    assert without_tags(reply) == "\n\n<PAGE>\n\n".join(page.strip() for page in pages)


@pytest.mark.parametrize(
    ("reply", "blocks"),
    [
        ("<|ref|>title\n# Head", [Block("title", [], "# Head")]),
        ("<|det|>[[0, 0, 999, 999]]\nText", [Block("", [[0, 0, 100, 200]], "Text")]),
        ("<|ref|>a<|/ref|><|det|>[[1, 2, 3]]<|/det|>b", [Block("a", [], "b")]),
        ("<|ref|>a<|/ref|><|det|>[[x, 2, 3, 4]]<|/det|>b", [Block("a", [], "b")]),
        ("<|/det|>a<|/ref|>", [Block("", [], "a")]),
        ("a<|ref|><|/ref|><|det|><|/det|>", [Block("", [], "a")]),
        (
            "<|ref|>a<|/ref|><|det|>[[-5, 0, 2000, 999999999999]]<|/det|>",
            [Block("a", [], "")],
        ),
        (
            "<|ref|>a<|/ref|><|det|>[[-5, 0, 2000, 999999999]]<|/det|>",
            [Block("a", [[0, 0, 100, 200]], "")],
        ),
        ("<|ref|>a<|ref|>b<|/ref|>", [Block("a", [], ""), Block("b", [], "")]),
        ("<|grounding|>a", [Block("", [], "a")]),
    ],
)
def test_damaged_replies(reply, blocks):
    assert read_blocks(reply, (100, 200)) == blocks


PIECES = st.lists(
    st.sampled_from(
        ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "[[1, 2, 3, 4]]", "[", "]", "1,", "x", "\n"]
    ),
    max_size=30,
)


@settings(max_examples=50, deadline=None)
@given(PIECES | st.text(max_size=40).map(list))
def test_nothing_raises_and_no_text_is_lost(pieces):
    reply = "".join(pieces)
    blocks = read_blocks(reply, (640, 480))
    assert all(0 <= n <= 640 for block in blocks for box in block.boxes for n in box)
    found = "".join(block.type + block.text for block in blocks)
    assert found.count("x") <= reply.count("x")
    if "<|det|>" not in reply:
        assert found.count("x") == reply.count("x")
    assert "<|ref|>" not in without_tags(reply)


def test_a_long_reply_is_read_in_time_proportional_to_its_length():
    reply = "<|ref|>" * 50_000 + "[" * 50_000 + "1," * 50_000 + "<|det|>" + "[" * 100_000
    assert len(read_blocks(reply, (10, 10))) < 50_000
