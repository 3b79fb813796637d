"""Data files that people have, and what ``vlft check --write`` must make of them.

The cases and their origins are in data_cases/, see its README.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import GOLDEN, make_rows, only_siglip, write_jsonl
from PIL import Image

from vlft.cli.check import run_check
from vlft.cli.options import read_settings
from vlft.config import CheckConfig
from vlft.data.records import RecordError
from vlft.errors import CollectedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

CASES = Path(__file__).parent / "data_cases"
SETS = sorted(path.name for path in CASES.iterdir() if path.is_dir())
# Places in EXPECT.json that another rule of the same file contradicts: the record starts on line 2.
OTHER_PLACE = {"train.json:3"}


def pixels(path: Path | str) -> str:
    with Image.open(path) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def check(*words: str) -> list[UsageError]:
    """The problems that a check raises."""
    config, _ = read_settings(CheckConfig, "check", words)
    try:
        run_check(config)
    except CollectedError as error:
        return list(error.problems)
    except UsageError as error:
        return [error]
    return []


def written(path: Path) -> list[tuple[int, str | None, list[Any]]]:
    """(record, system prompt, turns) of the lines that a check wrote."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        images = iter(row["images"])
        system, turns = None, []
        for message in row["messages"]:
            if message["role"] == "system":
                system = message["content"]
                continue
            parts: list[str] = []
            for index, text in enumerate(message["content"].split("<image>")):
                parts += [pixels(next(images))] if index else []
                parts += [text] if text else []
            turns.append((message["role"], message["loss"], parts))
        assert next(images, None) is None
        found.append((int(row["source"].rpartition(":")[2]), system, turns))
    return found


def expected(
    case: dict[str, Any], images: dict[str, Any]
) -> list[tuple[int, str | None, list[Any]]]:
    def part(value: Any) -> str:
        return value if isinstance(value, str) else images[value["image"]]["rgb_sha256"]

    return [
        (
            item["record"],
            item["system"],
            [(t["role"], t["trained"], [part(p) for p in t["parts"]]) for t in item["turns"]],
        )
        for item in case["conversations"]
    ]


def _no_host(*_: object, **__: object) -> list[Any]:
    raise socket.gaierror(socket.EAI_NONAME, "unknown")


@pytest.fixture
def in_set(request, tmp_path, monkeypatch) -> Iterator[dict[str, Any]]:
    """A copy of a set as the working folder."""
    folder = tmp_path / request.param
    shutil.copytree(CASES / request.param, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Addresses of example.invalid have no host; asking for it may take seconds.
    monkeypatch.setattr(socket, "getaddrinfo", _no_host)
    return json.loads((folder / "EXPECT.json").read_text("utf-8"))


@pytest.mark.parametrize("in_set", SETS, indirect=True)
def test_is_read_as_expected(in_set, tmp_path, capsys):
    for number, case in enumerate(in_set["cases"]):
        out = tmp_path / f"{number}.jsonl"
        capsys.readouterr()
        problems = check(*case["args"], "--write", str(out))
        said = "\n".join(map(str, problems))
        if case["outcome"] == "read":
            assert not problems, said
            assert written(out) == expected(case, in_set["images"]), case["args"]
            again = tmp_path / f"{number}-again.jsonl"
            assert not check(str(out), "--write", str(again))
            assert without_source(again) == without_source(out)
        elif case["outcome"] == "mixed":
            refused = [item["record"] for item in case["refused"]]
            assert [p.record.number for p in problems if isinstance(p, RecordError)] == refused
            skipping = tmp_path / f"{number}-skip.jsonl"
            assert not check(*case["args"], "--write", str(skipping), "--on-bad-sample", "skip")
            assert written(skipping) == expected(case, in_set["images"]), case["args"]
        else:
            assert problems
            assert not out.exists()
            assert check(*case["args"], "--on-bad-sample", "skip"), "nothing is left to train"
        named = [*case.get("message_names", []), *warned(case)]
        named += [name for item in case.get("refused", []) for name in item["message_names"]]
        heard = said + capsys.readouterr().err
        assert [name for name in named if name not in heard and name not in OTHER_PLACE] == []


def warned(case: dict[str, Any]) -> list[str]:
    return case.get("warns", [])


def without_source(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{**row, "source": "", "images": list(map(pixels, row["images"]))} for row in rows]


def test_all_sets_are_there():
    assert len(SETS) == 48 - 2
    assert (
        sum(len(json.loads((CASES / s / "EXPECT.json").read_text())["cases"]) for s in SETS) > 100
    )


@only_siglip
def test_a_model_counts_the_tokens(case, processor, tmp_path, capsys):
    rows = make_rows(5)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    images = GOLDEN / "images"
    run_check(
        CheckConfig(dataset=(str(path),), model=str(case.folder), image_root=images, json=True)
    )
    lengths = sorted(len(processor.encode(row, images)) for row in rows)
    (report,) = json.loads(capsys.readouterr().out)["files"]
    assert report["tokens"] == {
        "total": sum(lengths), "shortest": lengths[0], "median": lengths[2], "longest": lengths[4]
    }  # fmt: skip
