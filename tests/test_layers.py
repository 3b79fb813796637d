"""Imports point down only, and no file grows into two."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlft"

# From the top; a module may import from its own line and from those below.
LAYERS = [
    {"cli", "__main__"},
    {"serving"},
    {"training", "inference", "evaluation", "planning", "report", "sharing"},
    {"checkpoints", "vision", "packing"},
    {"families"},
    {"models", "data"},
    {"config", "settings", "distributed"},
    {"files", "gpus", "locks"},
    {"schema"},
    {"patterns"},
    {"errors", "console"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of vlft that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlft."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "vlft":
            found |= {alias.name for alias in node.names} & LEVEL.keys()
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("vlft.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return  # the public names, imported lazily
    here = LEVEL[room(path)]
    wrong = {name for name in imported(path) if LEVEL[name] < here}
    assert not wrong


def test_training_and_inference_do_not_know_each_other():
    for path in FILES:
        if room(path) == "training":
            assert "inference" not in imported(path)
        if room(path) == "inference":
            assert "training" not in imported(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    """A long file or function is a sign that two ideas share a room."""
    text = path.read_text("utf-8")
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 45, node.name


def test_hardly_anything_catches_everything():
    """The last catch of the command line, the reader of tokenizers, and the user's own metrics."""
    broad = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                caught = {
                    name.id for name in ast.walk(node.type or node) if isinstance(name, ast.Name)
                }
                if node.type is None or caught & {"Exception", "BaseException"}:
                    broad.append(path.relative_to(PACKAGE))
    own = Path("evaluation/own.py")
    assert broad == [Path("cli/app.py"), own, Path("families/tokenizer.py")]


def test_no_code_from_the_hub():
    for path in FILES:
        text = path.read_text("utf-8")
        assert "trust_remote_code" not in text
        assert "weights_only=False" not in text
