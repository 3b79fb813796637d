"""``vlft``: finds the command, and is the one place where errors become text and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from vlft import __version__
from vlft.cli.commands import COMMANDS
from vlft.cli.help import print_command, print_overview
from vlft.cli.options import read_settings
from vlft.console import err, out, show_error
from vlft.errors import ConfigError, StoppedError, UsageError, VlftError, shown
from vlft.settings import unknown_name

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def app() -> int:
    """Runs the command that the command line names; returns the exit code.

    Raises:
        VlftError: there is no such command, or it failed.
    """
    typed, *words = sys.argv[1:] or ["--help"]
    name = typed.replace("_", "-")
    if typed in ("--help", "-h"):
        print_overview("Fine-tune, run and merge DeepSeek's vision-language models.", COMMANDS)
    elif typed == "--version":
        out.print(f"vlft {__version__}")
    elif name == "export":
        hint = "vlft merge-lora writes a merged model, vlft convert another layout"
        raise ConfigError("unknown command 'export'", place="vlft", hint=hint)
    elif name not in COMMANDS:
        raise unknown_name(typed, list(COMMANDS), place="vlft", what="command")
    elif "--help" in words or "-h" in words:
        print_command(name, COMMANDS[name])
    else:
        return COMMANDS[name].run(*read_settings(COMMANDS[name].config, name, words))
    return 0


def _as_ours(error: VlftError | OSError | KeyboardInterrupt) -> VlftError:
    """The error to show: of the system's own, what is wrong with a file or a disk."""
    if isinstance(error, VlftError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return StoppedError()
    reason = str(error.strerror or error).split("\n")[0]
    place = shown(error.filename) if isinstance(error.filename, str) else ""
    wrong_path = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, (*wrong_path, PermissionError)):
        hint = "name another path; --debug shows what it is needed for"
        return UsageError(f"cannot be used ({reason})", place=place, hint=hint)
    return VlftError(reason, place=place, hint="--debug shows the traceback")


def _is_shown_by_another_rank(error: VlftError) -> bool:
    """Whether local rank 0 shows it: all ranks find a mistake in the input, one should say it."""
    return isinstance(error, UsageError | StoppedError) and os.environ.get("LOCAL_RANK", "0") != "0"


def _pass_on(dropped: UnraisableHookArgs) -> None:
    """Sends a Ctrl-C again that Python dropped, as it drops whatever a callback raises."""
    if dropped.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


def main() -> None:
    """Runs the command line; a user's mistake is text and an exit code, never a traceback."""
    sys.unraisablehook = _pass_on
    try:
        sys.exit(app())
    except BrokenPipeError:
        # The reader of a pipe, e.g. head, has left. Python would fail to flush stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (VlftError, OSError, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            err.print_exception()
        ours = _as_ours(error)
        if not _is_shown_by_another_rank(ours):
            show_error(str(ours))
        sys.exit(ours.exit_code)
