"""Outputs that a command must not write to, or must write to without harm to anything beside."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from damage import make_odd

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    from hostile import Stage

# Commands that write a folder, and those that write a file.
FOLDERS = ("merge-lora", "convert", "sft")
FILES = ("infer", "check")
FLAGS = {
    "merge-lora": "--output-dir", "convert": "DST", "sft": "--output-dir", "infer": "--output",
    "check": "--write",
}  # fmt: skip
# Below the belongings, see test_hostile.py.
THERE = (
    "mine", "mine/notes.txt", "run", "run/checkpoint-1", "run/checkpoint-1/state",
    "run/run_config.json", "run/metrics.jsonl", "data", "data/data.jsonl", "data/a.png", "model",
    "model/config.json", "ours", "ours/config.json", "answers", "answers/answers.jsonl",
    "answers/answers.settings.json", "",
)  # fmt: skip
NAMES = (
    "n" * 100_000, "n" * 255, "n" * 245, "n" * 230, "a\x1b[31m\nerror: x", "\udcff", "a\0b", "a b",
    "-n", "a/b/c", "猫", "a.jsonl", "[a]*?", "a\\b", "~nobody-here", "a#3", "%20",
)  # fmt: skip
WORDS = ("", " ", ".", "..", "~", "/", "~/here", "-", "--", "/dev/null/a", "/proc/self/a", "\0")


@dataclass(frozen=True)
class Trial:
    """A command line, and what may become of the stage.

    Attributes:
        words: the command line.
        what: the target is, for the report.
        names: a refusal holds one of them.
        may_change: whether a path may be another after a success.
    """

    words: list[str]
    what: str
    names: list[str]
    may_change: Callable[[str], bool]


def all_targets() -> list[tuple[str, str]]:
    """Kind and name of each target."""
    return [
        *(("there", name) for name in THERE),
        *(("new", name) for name in NAMES),
        *(("word", word) for word in WORDS),
        *(("odd", kind) for kind in ("pipe", "circle", "nowhere", "socket", "null", "hard link")),
        *(("link", name) for name in THERE[:-1]),
        *(("below", name) for name in ("mine/notes.txt", "data/a.png", "circle", "pipe", "link")),
        *(("beside", kind) for kind in BESIDE),
    ]


# Things beside or in a target that are not what vlft puts there.
BESIDE = (
    "lock file", "lock link", "lock folder", "lock pipe", "settings", "settings link",
    "settings folder", "infer link", "infer file", "infer pipe", "mark link", "mark pipe",
    "mark lies", "mark text", "file in ours", "link in ours",
)  # fmt: skip


def draw(stage: Stage, target: tuple[str, str], chance: random.Random) -> Trial:
    """Prepares the stage for a target, and a command that writes to it."""
    kind, name = target
    command = chance.choice((*FOLDERS, *FILES))
    given = MAKE[kind](stage, name, command)
    if kind == "beside" and name.startswith("settings"):
        command = "infer"
    words = _command(command, stage, given)
    overwrite = command != "sft" and chance.random() < 0.6
    if name.startswith("infer "):
        words = ["infer", "--ckpt-dir", str(stage.copy / "run"), "--dataset",
                 str(stage.copy / "data" / "data.jsonl"), "--max-new-tokens", "1"]  # fmt: skip
        given = str(stage.copy / "run" / "infer")
    words += ["--overwrite"] * overwrite
    if command == "sft":
        # Its output is a folder of runs, which it adds one to.
        own: tuple[str, ...] = ()
    elif overwrite:
        own = ("copy/ours/", "copy/ours", "copy/answers/answers.")
    else:
        own = ("copy/answers/answers.jsonl",) if command == "infer" else ()
    before = {str(path) for path in stage.copy.rglob("*")}
    home = stage.copy.parent

    def may_change(path: str) -> bool:
        is_new = str(home / path) not in before
        return is_new or path.startswith(own)

    place = given.rstrip("/").rpartition("/")[2]
    escaped = place.encode("unicode_escape").decode()
    names = [
        FLAGS[command],
        place[:20] or "/",
        escaped[:20],
        "--model",
        stage.copy.name,
    ]
    return Trial(words, f"{kind} {name[:40]}", names, may_change)


def _command(command: str, stage: Stage, target: str) -> list[str]:
    folder = stage.copy
    data = str(folder / "data" / "data.jsonl")
    if command == "merge-lora":
        return [command, "--ckpt-dir", str(folder / "run"), "--output-dir", target]
    if command == "convert":
        return [command, str(folder / "model"), target]
    if command == "infer":
        return [command, "--model", str(folder / "model"), "--dataset", data, "--max-new-tokens",
                "1", "--output", target]  # fmt: skip
    if command == "check":
        return [command, data, "--write", target]
    return [command, "--model", str(folder / "model"), "--dataset", data, "--max-steps", "1",
            "--batch-size", "2", "--no-show-sample", "--vision-cache", "memory",
            "--output-dir", target]  # fmt: skip


def _there(stage: Stage, name: str, _command: str) -> str:
    return str(stage.copy / name)


def _new(stage: Stage, name: str, command: str) -> str:
    ending = ".jsonl" if command in FILES and not name.endswith(".jsonl") else ""
    return f"{stage.output}/{name}{ending}"


def _word(_stage: Stage, name: str, _command: str) -> str:
    return name


def _odd(stage: Stage, kind: str, command: str) -> str:
    path = stage.copy / ("odd.jsonl" if command in FILES else "odd")
    if kind == "socket":
        # Its whole path may be too long for a socket.
        before = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.fchdir(before)
        os.close(before)
    elif kind == "hard link":
        os.link(stage.copy / "data" / "data.jsonl", path)
    elif kind == "null":
        # A stand-in for /dev/null, which only root can make.
        if os.geteuid():
            os.mkfifo(path)
        else:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    else:
        make_odd(path, kind)
    return str(path)


def _link(stage: Stage, name: str, command: str) -> str:
    path = stage.copy / ("link.jsonl" if command in FILES else "link")
    path.symlink_to(stage.copy / name)
    return str(path)


def _below(stage: Stage, name: str, command: str) -> str:
    path = stage.copy / name
    if name == "link":
        path.symlink_to(stage.copy / "mine")
    elif not path.exists():
        make_odd(path, name)
    return str(path / ("new.jsonl" if command in FILES else "new"))


def _beside(stage: Stage, kind: str, command: str) -> str:
    """Puts something beside an output or in an earlier one; returns that output."""
    mine = stage.copy / "mine" / "notes.txt"
    what, _, how = kind.partition(" ")
    if what == "infer":
        path = stage.copy / "run" / "infer"
        _put(path, how, mine.parent)
        return str(path)
    if what in ("mark", "file", "link"):
        target = stage.copy / "ours"
        path = target / (".vlft" if what == "mark" else "other")
        if what == "mark":
            path.unlink()
        texts = {
            "lies": '{"vlft": "1", "files": ["../mine", ".", "config.json"]}',
            "text": "vlft\n",
        }
        if how in texts:
            path.write_text(texts[how])
        else:
            _put(path, "link" if what == "link" else how, mine)
        return str(target)
    if what == "settings":
        target = stage.output / "new.jsonl"
        _put(target.with_name("new.settings.json"), how, mine)
        return str(target)
    target = stage.output / ("new.jsonl" if command in FILES else "new")
    _put(target.with_name(f".{target.name}.lock"), how, mine)
    return str(target)


def _put(path: Path, how: str, mine: Path) -> None:
    if how == "link":
        path.symlink_to(mine)
    elif how in ("pipe", "folder"):
        make_odd(path, how)
    else:
        path.write_text("mine\n")


MAKE: dict[str, Callable[[Stage, str, str], str]] = {
    "there": _there, "new": _new, "word": _word, "odd": _odd, "link": _link, "below": _below,
    "beside": _beside,
}  # fmt: skip
