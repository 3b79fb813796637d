"""Pieces of a growing text: together they are the text, whatever tokens it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlft.inference.text_stream import TextStream


def decode(token_ids):
    """A token is a byte."""
    return bytes(token_ids).decode("utf-8", "replace")


def read(data, sizes, stops):
    """The pieces of bytes that come in groups, and the stream."""
    stream = TextStream(decode, stops)
    pieces, start = [], 0
    for size in sizes:
        if start < len(data) and not stream.stopped:
            pieces.append(stream.take(data[start : start + size]))
            start += size
    if not stream.stopped:
        pieces.append(stream.take(data[start:]))
    return [*pieces, stream.end()], stream


@given(st.text("ab \n\u00e9\u20ac\ufffd"), st.lists(st.integers(1, 3)))
def test_the_pieces_are_the_text_without_outer_space(text, sizes):
    pieces, _ = read(text.encode(), sizes, ())
    assert "".join(pieces) == text.strip()


@given(st.text("ab \n\u20ac", max_size=12), st.sampled_from(["a", "ab", "ba\n", "\u20ac ", " "]))
def test_it_ends_before_the_first_stop(text, stop):
    pieces, stream = read(text.encode(), [1] * 40, (stop,))
    assert "".join(pieces) == text.partition(stop)[0].strip()
    assert stream.stopped == (stop in text)


@pytest.mark.parametrize(
    ("tokens", "stops", "pieces"),
    [
        ([" ", "a", " ", "b "], (), ["", "a", "", " b", ""]),
        (["a", "EN", "D", "x"], ("END",), ["a", "", "", ""]),
        (["a", "EN", "E"], ("END",), ["a", "", "EN", "E"]),
        (["a", "EN"], ("END",), ["a", "", "EN"]),
        (["\u20ac", "1"], (), ["\u20ac", "1", ""]),
    ],
)
def test_what_may_change_is_held_back(tokens, stops, pieces):
    stream = TextStream(decode, stops)
    made = []
    for token in tokens:
        if not stream.stopped:
            made.append(stream.take(list(token.encode())))
    made.append(stream.end())
    assert made == pieces


def test_bytes_of_a_character_wait_for_each_other():
    stream = TextStream(decode)
    assert [stream.take([byte]) for byte in "\u20ac".encode()] == ["", "", "\u20ac"]
    assert stream.take([0xE2]) == ""
    assert stream.end() == "\ufffd"
