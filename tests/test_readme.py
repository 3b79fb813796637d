"""README and docs are true: their commands run, their tables are what the code says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with what the README's reader has: the repository's data and templates."""
    home = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "sample_data", home / "sample_data")
    return home


def test_the_two_commands_come_first():
    assert blocks("sh")[0].split("\n")[:2] == [
        "make demo     # fine-tune, answer, merge on sample data: under 6 minutes on two cores",
        "make test     # all tests",
    ]


def test_the_commands_run_in_order(copy):
    """Every line of the README's console blocks; training is cut short, the demo does all of it."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks("console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    assert len(lines) >= 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in lines:
        short = f"{line} --max-steps 40" if line.startswith("vlft sft") else line
        done = subprocess.run(
            ["bash", "-c", short],
            cwd=copy,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)


def test_the_python_block_runs(copy):
    code = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
