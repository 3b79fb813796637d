"""What the shell offers after TAB."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from vlft.cli.commands import COMMANDS
from vlft.cli.completion import completions
from vlft.settings import flag


def offered(line: str, command: str = "sft") -> list[str]:
    *words, incomplete = line.split(" ")
    return [offer.value for offer in completions(COMMANDS[command].config, words, incomplete)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--quant", ["--quantize"]),
        ("--quantize ", ["none", "nf4", "int8"]),
        ("--quantize n", ["none", "nf4"]),
        ("--quantize = n", ["none", "nf4"]),
        ("--dataset a.jsonl --quantize nf", ["nf4"]),
        ("--lora_target", []),
        ("--dataset ", []),  # files, which the shell offers
        ("--dataset a.jsonl b", []),
        ("--no-share", ["--no-share-prefix"]),
        ("--use-dora --lora-r", ["--lora-rank"]),
        ("--unknown n", []),
    ],
)
def test_flags_and_their_words(line, expected):
    assert offered(line) == expected


def test_a_repeatable_flag_takes_words_until_the_next_flag():
    assert offered("--metric exact-match cont", "eval") == ["contains"]
    assert offered("--metric exact-match --batch-size ex", "eval") == []
    assert "FILE.py" not in offered("--metric ", "eval")


def test_without_a_word_flags_are_offered_where_a_command_takes_no_arguments():
    flags = offered("")
    assert {"--dataset", "--debug", "--help", "--no-share-prefix"} <= set(flags)
    assert offered("", "convert") == []
    assert "--format" in offered("src dst --f", "convert")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_offered(command):
    fields = dataclasses.fields(COMMANDS[command].config)
    names = {flag(f.name) for f in fields if not f.metadata["argument"]}
    assert names <= set(offered("--", command))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vlft merge", "merge-lora"),
        ("vlft sft --quantize nf", "nf4"),
        ("vlft nonsense --x", ""),
    ],
)
def test_the_shell_gets_it(line, expected):
    """As bash asks, through the installed command; an unknown command is no message."""
    words = line.split(" ")
    variables = {"_VLFT_COMPLETE": "complete_bash", "COMP_WORDS": line}
    code = "import sys; sys.argv = ['vlft']; from vlft.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables | {"COMP_CWORD": str(len(words) - 1)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == (expected, "")
