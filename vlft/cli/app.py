"""``vlft``: the application, and the one place where errors become text and exit codes."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from io import TextIOWrapper
from pathlib import Path
from traceback import extract_tb, format_exception
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from vlft import __version__
from vlft.cli.commands import COMMANDS
from vlft.cli.completion import CompletedCommand
from vlft.cli.help import print_command, print_overview
from vlft.cli.options import read_settings
from vlft.console import err, show_error, warn
from vlft.errors import (
    REPORT,
    ConfigError,
    StoppedError,
    UsageError,
    VlftError,
    is_out_of_memory,
    printable,
    shown,
    unknown_name,
)
from vlft.files import is_disk_full

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType

# What a launcher such as torchrun sets for each process that it starts.
RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
PURPOSE = "Fine-tune, run and merge DeepSeek's vision-language models."


class _Group(TyperGroup):
    """``vlft``, with our own help page and error for an unknown command."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Prints the page."""
        print_overview(PURPOSE, COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name.

        Raises:
            ConfigError: there is none.
        """
        name = cmd_name.replace("_", "-")
        if name == "export" and not ctx.resilient_parsing:
            hint = "vlft merge-lora writes a merged model, vlft convert another layout"
            raise ConfigError("unknown command 'export'", place="vlft", hint=hint)
        if name not in COMMANDS:
            if ctx.resilient_parsing:  # a shell asks what may follow
                return None
            raise unknown_name(cmd_name, list(COMMANDS), place="vlft", what="command")
        return super().get_command(ctx, name)


def _run(ctx: typer.Context) -> None:
    """Runs the command that the context names, with the words that follow it."""
    name = str(ctx.command.name)
    if "--help" in ctx.args or "-h" in ctx.args:
        print_command(name, COMMANDS[name])
        return
    COMMANDS[name].run(*read_settings(COMMANDS[name].config, name, ctx.args))


# Typer finds the command; cli/options.py reads its words, in all the spellings that are allowed.
UNREAD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
app = typer.Typer(cls=_Group, pretty_exceptions_enable=False)
for _name, _command in COMMANDS.items():
    app.command(_name, cls=CompletedCommand, help=_command.help, context_settings=UNREAD)(_run)


@app.callback(
    invoke_without_command=True,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help", "-h"]},
)
def options(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version")] = False
) -> None:
    """What ``vlft`` does without a command."""
    if version:
        typer.echo(f"vlft {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print_overview(PURPOSE, COMMANDS)


def _as_ours(error: BaseException) -> VlftError:
    """The error to show: what is wrong with a file, a disk or the memory, or a fault of vlft."""
    if isinstance(error, VlftError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return StoppedError()
    if is_out_of_memory(error):
        hint = "close other programs, or use a smaller model, --dtype bfloat16 or shorter rows"
        return VlftError("out of memory", place="vlft", hint=hint)
    if isinstance(error, OSError):
        return _of_system(error)
    here = str(Path(__file__).parents[1])
    frames = [f for f in extract_tb(error.__traceback__) if f.filename.startswith(here)]
    place = f"vlft{frames[-1].filename.removeprefix(here)}:{frames[-1].lineno}" if frames else ""
    found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = f"a fault of vlft: {REPORT}, and what --debug shows"
    return VlftError(found, place=place, hint=hint)


def _of_system(error: OSError) -> VlftError:
    """What is wrong with a file or a disk."""
    reason = str(error.strerror or error).split("\n")[0]
    place = shown(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
    wrong_path = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    unusable = isinstance(error, (*wrong_path, PermissionError))
    if unusable or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        hint = "name another path; --debug shows what it is needed for"
        return UsageError(f"cannot be used ({reason})", place=place, hint=hint)
    hint = "make room, then run the command again" if is_disk_full(error) else ""
    return VlftError(reason, place=place, hint=hint or "--debug shows the traceback")


def _is_shown_by_another_rank(error: VlftError) -> bool:
    """Whether local rank 0 shows it: all ranks find a mistake in the input, one should say it."""
    return isinstance(error, UsageError | StoppedError) and os.environ.get("LOCAL_RANK", "0") != "0"


def _pass_on(dropped: UnraisableHookArgs) -> None:
    """Sends a Ctrl-C again that Python dropped, as it drops whatever a callback raises."""
    if dropped.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


def _forget_stray_ranks() -> None:
    """Removes what an environment holds of a launcher that has not started this process.

    Accelerate would wait for ranks that nobody starts, and only rank 0 shows messages.
    """
    found = {name: os.environ.get(name, "") for name in RANKS}
    numbers = [int(value) for value in found.values() if re.fullmatch(r"\d{1,9}", value)]
    is_launched = len(numbers) == len(RANKS) and numbers[0] <= numbers[1] < numbers[2]
    if any(found.values()) and not (is_launched and {*ADDRESS} <= os.environ.keys()):
        given = [f"{name}={os.environ.pop(name)}" for name in RANKS if name in os.environ]
        words = f"{', '.join(given)} ignored: no launcher has set all of"
        warn(f"{words} {', '.join((*RANKS, *ADDRESS))}, so this is a run of one process")


def _fail(error: BaseException) -> NoReturn:
    """Ends the process with the message and the exit code of an error."""
    if "--debug" in sys.argv:
        err.print(printable("".join(format_exception(error)), keep="\n"), markup=False)
    ours = _as_ours(error)
    if not _is_shown_by_another_rank(ours):
        show_error(str(ours))
    sys.exit(ours.exit_code)


def _end_as_by_ctrl_c() -> None:
    """Has SIGTERM, and SIGHUP unless it is ignored (nohup), end the work without leftovers.

    Training has its own handlers while it runs. The ranks of a launcher are left out: one that
    ends in good order alone would keep the others waiting.
    """
    if RANKS[-1] in os.environ or threading.current_thread() is not threading.main_thread():
        return

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        # With the terminal gone, output to it fails.
        err.quiet = err.quiet or number != signal.SIGTERM
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    # Windows has no such signal.
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        signal.signal(hangup, stop)


def _let_segments_grow() -> None:
    """Asks torch's allocator on CUDA for segments that grow, unless the user has settings of it.

    Rows of changing lengths would otherwise leave holes that no longer row fits into.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    # Torch warns of the setting on Windows.
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"


def main() -> None:
    """Runs the command line; a user's mistake is text and an exit code, never a traceback."""
    _let_segments_grow()
    sys.unraisablehook = _pass_on
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A path or a reply may hold characters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        _forget_stray_ranks()
        _end_as_by_ctrl_c()
        app()
    except BrokenPipeError:
        # The reader of a pipe, e.g. head, has left. Python would fail to flush stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as end:
        # What Typer makes of these two, without a word.
        cause = getattr(end.__context__, "__cause__", None)
        if isinstance(cause, EOFError | KeyboardInterrupt):
            _fail(cause)
        raise
    except BaseException as error:  # noqa: BLE001 (what nothing else has caught)
        _fail(error)
