"""docs/security.md: each promise names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/security.md").read_text("utf-8")
PROMISES = re.split(r"^\d+\. ", TEXT.partition("## Promises")[2].partition("\n## ")[0], flags=re.M)
NAMED = re.compile(r"`(tests/\w+\.py)::([\w:]+)`")


def names_of(path: Path) -> set[str]:
    """Tests of a file as pytest names them."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("promise", PROMISES[1:], ids=lambda text: text.split("**")[1])
def test_a_promise_names_tests_that_are_there(promise):
    named = NAMED.findall(promise)
    assert named
    for file, name in named:
        assert name.rpartition("::")[2].startswith("test_")
        assert name in names_of(ROOT / file), f"{file}::{name}"


def test_the_promises_are_numbered():
    assert len(PROMISES) == 14
    for heading in ("## Promises", "## Out of scope"):
        assert heading in TEXT
