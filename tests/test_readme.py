"""README and docs are true: their commands run, their tables are what the code says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import subprocesses
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.plot import rows_of
from vlft.cli.commands import COMMANDS
from vlft.settings import flag

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCS = ROOT / "docs"
START = (DOCS / "start.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[str]:
    """The command lines of the console blocks."""
    return [
        line.removeprefix("$ ")
        for block in blocks("console", text)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that the README's commands name; few records, so that encoding them is quick."""
    home = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "sample_data", home / "sample_data")
    for file in (home / "sample_data" / "handwriting").glob("*.jsonl"):
        lines = file.read_text("utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:160]), "utf-8")
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


def run_quickly(line: str, clone: Path) -> None:
    """Runs a command, which must succeed, in a process that has imported torch beforehand.

    It uses the repository's package instead of the installed copy, which ``run`` uses.
    """
    words = [
        found
        for word in shlex.split(line)[1:]
        for found in (sorted(map(str, clone.glob(word))) if "*" in word else [word])
    ]
    errors = clone / "errors.txt"
    process = subprocesses.start(words, errors, partial(os.chdir, clone))
    process.join()
    assert process.exitcode == 0, (line, errors.read_text("utf-8"))


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
    """The commands of the page Start work, and after them those of Evaluate, which use its run.

    Training stops after a few steps, because ``vlft demo`` already trains to the end.
    """
    plan, train, *others = commands(START)
    assert set(commands(README)) <= {plan, train, *others}
    run(["bash", "-c", plan], clone, environment)
    run(["bash", "-c", f"{train} --max-steps 40"], clone, environment)
    evaluation = commands((DOCS / "evaluation.md").read_text("utf-8"))
    assert len(evaluation) == 2
    for line in (*others, *evaluation):
        if "|" in line:
            run(["bash", "-c", line], clone, environment)
        else:
            run_quickly(line, clone)


def test_the_python_block_runs(clone, environment):
    code = "\n".join(blocks("python", START + (DOCS / "python.md").read_text("utf-8")))
    assert run([sys.executable, "-c", code], clone, environment).strip()


@pytest.mark.parametrize(
    "document",
    [*ROOT.glob("*.md"), *DOCS.rglob("*.md")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8")):
        assert (document.parent / target).exists(), target


# Of programs that are not vlft, of every command, and words about flags.
OTHERS = {
    "--config",
    "--config_file",
    "--debug",
    "--help",
    "--index-url",
    "--no-x",
    "--version",
    "--x",
}
OTHER_PROGRAMS = r"benchmarks|pip |pytest|accelerate|torchrun|swift|llama|vllm|lmms|http"


# errors.md shows what is wrong.
@pytest.mark.parametrize(
    "document",
    [ROOT / "README.md", *(path for path in DOCS.glob("*.md") if path.name != "errors.md")],
    ids=lambda path: path.name,
)
def test_flags_that_documents_name_exist(document):
    """Lines of other programs, which name them, are left out."""
    known = {
        name
        for command in COMMANDS.values()
        for field in dataclasses.fields(command.config)
        for name in (flag(field.name), flag(field.name).replace("--", "--no-", 1))
    }
    named = {
        name
        for line in document.read_text("utf-8").splitlines()
        if not re.search(OTHER_PROGRAMS, line)
        for name in re.findall(r"(?<![\w-])--[a-z][\w-]+", line)
    }
    assert named <= known | OTHERS


CHINESE = (ROOT / "README.zh-CN.md").read_text("utf-8")


def test_the_readme_is_short():
    assert README.count("\n") <= 150
    assert CHINESE.count("\n") <= 150


def test_the_chinese_readme_says_the_same():
    """Blocks, commands, flags, model ids, figures and links."""
    for language in ("sh", "text", "json", "console"):
        assert blocks(language, CHINESE) == blocks(language)
    chinese = CHINESE.replace("docs/zh/", "docs/")
    for pattern in (r"`[^`]+`", r"\d+\.\d+ / \d+\.\d+", r"^## ", r"\]\((?!README)[^)]+\)"):
        assert outside_of_blocks(pattern, README) == outside_of_blocks(pattern, chinese)


@pytest.mark.parametrize("page", sorted(DOCS.glob("zh/*.md")), ids=lambda page: page.name)
def test_the_chinese_pages_say_the_same(page):
    """Blocks, commands, flags, names and headings; each page leads to the other language's."""
    text = page.read_text("utf-8")
    original = (DOCS / page.name).read_text("utf-8")
    fenced = r"^```.*?^```"
    assert re.findall(fenced, text, re.S | re.M) == re.findall(fenced, original, re.S | re.M)
    for pattern in (r"`[^`]+`", r"^#+ ", r"^    .+"):
        assert outside_of_blocks(pattern, text) == outside_of_blocks(pattern, original)
    assert f"[English](../{page.name})" in text
    assert f"[中文](zh/{page.name})" in original


def outside_of_blocks(pattern: str, text: str) -> list[str]:
    """What matches outside of fenced blocks, sorted, in one line each."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return sorted(" ".join(found.split()) for found in re.findall(pattern, prose, re.M))


def test_figures_are_those_of_the_result_file():
    """The rows of docs/performance.md, and of them the README's columns."""
    measured = json.loads((ROOT / "benchmarks/results/peers-cpu.json").read_text("utf-8"))
    rows = rows_of(measured["comparisons"]).splitlines()[2:]
    text = (DOCS / "performance.md").read_text("utf-8")
    assert len(rows) == 6
    for row in rows:
        assert row in text
        cells = row.strip("| ").split(" | ")
        assert f" | {cells[1]} | {cells[4]} | {cells[6]} |" in README


def test_every_page_is_in_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    *english, chinese = site["nav"]
    pages = [page for entry in (*english, *chinese["中文"]) for page in entry.values()]
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_options_are_those_of_the_code(monkeypatch):
    """If not: python docs/make_options.py."""
    monkeypatch.syspath_prepend(DOCS)
    import make_options

    assert make_options.PAGE.read_text("utf-8") == make_options.page()


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
