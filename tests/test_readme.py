"""README and docs are true: their commands run, their tables are what the code says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of the repository that the README's commands name."""
    home = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "sample_data", home / "sample_data")
    return home


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the package as ``pip install .`` leaves it, away from the repository."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, site / package)
    for source, place in wheel["force-include"].items():
        shutil.copytree(ROOT / source, site / place)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(site)}


def run(command: list[str], clone: Path, environment: dict[str, str]) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def test_the_package_is_not_the_repository(clone, environment):
    code = "import vlft; print(vlft.__file__)"
    file = Path(run([sys.executable, "-c", code], clone, environment).strip())
    assert file.is_relative_to(environment["PYTHONPATH"])


def test_the_two_commands_come_first():
    assert blocks("sh")[0].split("\n")[:2] == [
        "make demo     # fine-tune, answer, merge on sample data: under 6 minutes on two cores",
        "make test     # all tests",
    ]


def test_the_commands_run_in_order(clone, environment):
    """Every line of the README's console blocks; training is cut short, the demo does all of it."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks("console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    assert len(lines) >= 3
    for line in lines:
        short = f"{line} --max-steps 40" if line.startswith("vlft sft") else line
        run(["bash", "-c", short], clone, environment)


def test_the_python_block_runs(clone, environment):
    code = "\n".join(blocks("python"))
    assert run([sys.executable, "-c", code], clone, environment).strip()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_files_that_documents_name_exist():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    named = {
        name
        for document in documents
        for name in re.findall(r"`((?:vlft|tests|benchmarks|docs)/[\w./-]+)`", document.read_text())
    }
    assert len(named) > 20
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_the_way_from_the_command_to_a_step_is_as_contributing_says():
    """Each of the first three files names the next one, and the loop's step uses the others."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    files = re.findall(r"^\d\. `(vlft/[\w/]+\.py)`", text, re.M)
    assert len(files) == 6
    sources = [(ROOT / name).read_text("utf-8") for name in files]
    modules = [name.removesuffix(".py").replace("/", ".") for name in files]
    assert modules[1] in sources[0]
    assert modules[2] in sources[1]
    for module in modules[3:]:
        assert any(module in source for source in sources[1:]), module


def test_the_scripts_remake_the_sample_data(tmp_path, environment):
    data, base = tmp_path / "handwriting", tmp_path / "base"
    run([sys.executable, "sample_data/handwriting.py", "--out-dir", str(data)], ROOT, environment)
    for name in ("train.jsonl", "val.jsonl"):
        assert (data / name).read_bytes() == (ROOT / "sample_data/handwriting" / name).read_bytes()
    images = list((data / "images").iterdir())
    assert len(images) == 1000
    for path in images:
        stored = ROOT / "sample_data" / path.relative_to(tmp_path)
        with Image.open(path) as made, Image.open(stored) as kept:
            assert made.tobytes() == kept.tobytes()
    run([sys.executable, "sample_data/tiny_base.py", str(base)], ROOT, environment)
    # The weights of tiny-vl are trained, in the recipe's next stages.
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (base / name).read_bytes() == (ROOT / "sample_data/tiny-vl" / name).read_bytes()
