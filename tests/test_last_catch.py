"""Whatever happens, the command line says it in one message that steers no terminal."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import sys
from functools import partial

import pytest
import subprocesses
import torch
from conftest import SIGLIP

from vlft import console
from vlft.checkpoints.outputs import output_folder
from vlft.cli import app
from vlft.errors import DataError, UsageError, VlftError
from vlft.files import is_disk_full, save_tensors


@pytest.fixture
def main(monkeypatch, capfd):
    """Runs ``vlft models`` with work that fails; returns the exit code and standard error."""

    def run(work, *words):
        def command(config):
            work()

        monkeypatch.setattr("vlft.cli.models.list_models", command)
        monkeypatch.setattr(sys, "argv", ["vlft", "models", *words])
        with pytest.raises(SystemExit) as end:
            app.main()
        return end.value.code, capfd.readouterr().err

    return run


def failing(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyError("a\x1b[31m\nerror: b"), 1, r"KeyError: 'a\x1b[31m\nerror: b'"),
        (RecursionError(), 1, "RecursionError"),
        (EOFError("Ran out of input"), 1, "EOFError: Ran out of input"),
        (MemoryError(), 1, "vlft: out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
            1,
            "vlft: out of memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "a"), 1, "a: No space left on device"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "b" * 99999), 2, "File name too long"),
        (OSError(errno.ELOOP, "Too many levels", b"\xff"), 2, r"\udcff: cannot be used"),
        (VlftError("found \x9b2J", place="a\nerror: b"), 1, r"a\nerror: b: found \x9b2J"),
    ],
)
def test_every_error_is_one_message(main, error, code, text):
    found, stderr = main(failing(error))
    assert found == code
    assert text in stderr
    assert stderr.count("error: ") == 1 + text.count("error: ")
    assert not any(character in stderr for character in "\x1b\x9b")
    assert len(stderr) < 1000
    assert "Traceback" not in stderr


def test_a_fault_of_vlft_is_to_be_reported_and_debug_shows_it(main):
    _, stderr = main(failing(ZeroDivisionError("x")))
    assert "please report it" in stderr
    _, stderr = main(failing(ZeroDivisionError("x")), "--debug")
    assert "Traceback" in stderr
    assert "in work" in stderr


def test_a_ctrl_c_anywhere_is_said(main):
    # A shell that starts the tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work():
        os.kill(os.getpid(), signal.SIGINT)

    try:
        assert main(work) == (130, "error: stopped; what was saved before is whole\n")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "stray",
    [
        {"LOCAL_RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"LOCAL_RANK": "x", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ],
)
def test_stray_variables_of_a_launcher_mute_nothing(main, monkeypatch, stray):
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    found, stderr = main(failing(UsageError("found 1", place="--x")))
    assert found == 2
    assert "error: --x: found 1" in stderr
    assert "warning: LOCAL_RANK" in stderr or "warning: RANK=0, WORLD_SIZE=2 ignored" in stderr


def test_of_real_ranks_the_first_speaks(main, monkeypatch):
    launched = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    for name, value in (launched | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert main(failing(UsageError("found 1"))) == (2, "")


def test_an_encoding_without_the_characters_of_a_message(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True))
    work = failing(DataError("found 猫", place="\udcff.jsonl"))
    monkeypatch.setattr("vlft.cli.models.list_models", lambda config: work())
    monkeypatch.setattr(sys, "argv", ["vlft", "models"])
    with pytest.raises(SystemExit):
        app.main()
    assert sys.stderr.buffer.getvalue() == rb"error: \udcff.jsonl: found \u732b" + b"\n"


def test_a_terminal_gets_no_control_characters_of_a_reply(monkeypatch):
    for terminal, expected in ((True, "a\\x1b[2J\tb\n"), (False, "a\x1b[2J\tb\n")):
        file = io.StringIO()
        monkeypatch.setattr(
            console, "out", console.Console(file=file, force_terminal=terminal, soft_wrap=True)
        )
        console.reply("a\x1b[2J\tb\n")
        assert file.getvalue() == expected


def test_what_the_system_says_of_a_tensor_file_is_its_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save_tensors({"a": torch.zeros(999)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_disk_full(error.value)


def test_a_circle_of_links(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with (
        pytest.raises(UsageError, match="circle: not a folder"),
        output_folder(tmp_path / "circle", [], overwrite=True),
    ):
        pass


def end_at_a_flush(number):
    os.fsync = lambda _: signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_an_ended_command_leaves_nothing(number, tmp_path):
    """Killed while it flushes its output, before that gets its name."""
    target = tmp_path / "out" / "base"
    words = ["convert", str(SIGLIP.folder), str(target), "--format", "transformers"]
    command = subprocesses.start(words, tmp_path / "errors", partial(end_at_a_flush, number))
    command.join(60)
    assert command.exitcode == 130
    assert not list(target.parent.glob("*"))
    assert ("stopped" in (tmp_path / "errors").read_text()) == (number == signal.SIGTERM)
