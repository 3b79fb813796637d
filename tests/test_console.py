"""What stderr shows while something takes long."""

from __future__ import annotations

import io
import itertools
import re
import time
import warnings

import pytest
from rich.console import Console

from vlft import console
from vlft.cli.quiet import quiet


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def screen(request, monkeypatch) -> io.StringIO:
    """What stderr gets, as a terminal or as a file."""
    written = io.StringIO()
    err = Console(file=written, force_terminal=request.param, width=40, soft_wrap=True)
    monkeypatch.setattr(console, "err", err)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return written


def wait_for(screen: io.StringIO, text: str) -> None:
    end = time.monotonic() + 10
    while text not in screen.getvalue() and time.monotonic() < end:
        time.sleep(0.01)
    assert text in screen.getvalue()


def test_long_work_is_shown(screen):
    with console.working("loading the model", after=0.2):
        assert "loading" not in screen.getvalue()
        wait_for(screen, "loading the model")
    if not console.err.is_terminal:
        assert screen.getvalue() == "loading the model\n"


def test_short_work_is_not(screen):
    with console.working("loading the model"):
        pass
    time.sleep(1.2)
    assert "loading" not in screen.getvalue()


def test_at_once(screen):
    with console.working("loading the model", after=0):
        wait_for(screen, "loading the model")


def test_an_error_ends_it(screen):
    with pytest.raises(ValueError, match="broken"), console.working("loading", after=0.1):
        raise ValueError("broken")
    time.sleep(0.2)
    assert "loading" not in screen.getvalue()


@pytest.mark.parametrize("screen", [True], indirect=True, ids=["terminal"])
def test_a_spinner_leaves_no_trace_and_lines_pass_through(screen):
    with console.working(50 * "x", after=0), console.working("inner", after=0):
        wait_for(screen, f"⠋ {35 * 'x'}…")
        console.info("a line")
        assert list(console.tracked([1, 2], "a bar within", 2)) == [1, 2]
    text = screen.getvalue()
    assert "a line\n" in text
    # Show the cursor, back to the first column, up, erase the line.
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_other_ranks_show_nothing(screen, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with console.working("loading the model", after=0):
        time.sleep(0.3)
    assert screen.getvalue() == ""


def test_tracked(screen):
    seen = []
    for item in console.tracked(range(3), "checking images", 3):
        seen.append(item)
        if item == 1 and not console.err.is_terminal:
            wait_for(screen, "checking images\n")
    assert seen == [0, 1, 2]
    assert screen.getvalue().count("\n") == 1


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(screen, monkeypatch):
    if console.err.is_terminal:
        return  # It has a bar.
    clock = itertools.count(0, 6)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    assert list(console.tracked(range(6), "checking samples", 1200)) == list(range(6))
    lines = [line for line in screen.getvalue().splitlines() if " of " in line]
    assert lines == [
        "checking samples: 1 of 1,200, 239:48 left",
        "checking samples: 3 of 1,200, 159:36 left",
        "checking samples: 5 of 1,200, 143:24 left",
    ]


def test_a_note_goes_with_it(screen, monkeypatch):
    clock = itertools.count(0, 20)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    notes = iter(["", "7 tokens/s", "8 tokens/s"])
    shown = list(console.tracked(range(3), "answering", 3, lambda: next(notes, "")))
    assert shown == [0, 1, 2]
    if not console.err.is_terminal:
        lines = [line for line in screen.getvalue().splitlines() if " of " in line]
        assert lines[1:] == [
            "answering: 1 of 3, 1:20 left, 7 tokens/s",
            "answering: 2 of 3, 0:30 left, 8 tokens/s",
        ]


def test_a_warning_of_a_library_is_a_line_that_steers_nothing(screen, monkeypatch):
    """It may hold text of a stranger's file."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        quiet()
        warnings.simplefilter("always")
        warnings.warn("set \x1b[31m\nerror: x" + "a" * 9999, stacklevel=1)
    # Without the styles that the console itself adds.
    shown = re.sub("\x1b\\[[\\d;]*m", "", screen.getvalue())
    expected = r"warning: set \\x1b\[31m\\nerror: xa+\.\.\.a+ \(test_console.py:\d+\)\n"
    assert re.fullmatch(expected, shown)
    assert len(shown) < 2000
