"""``vlft``: the application, and the one place where errors become text and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vlft import __version__
from vlft.cli.commands import COMMANDS
from vlft.cli.help import print_command, print_overview
from vlft.cli.options import read_settings
from vlft.console import err, show_error
from vlft.errors import ConfigError, StoppedError, UsageError, VlftError, shown
from vlft.settings import unknown_name

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

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
        if name == "export":
            hint = "vlft merge-lora writes a merged model, vlft convert another layout"
            raise ConfigError("unknown command 'export'", place="vlft", hint=hint)
        if name not in COMMANDS:
            raise unknown_name(cmd_name, list(COMMANDS), place="vlft", what="command")
        return super().get_command(ctx, name)


def _run(ctx: typer.Context) -> None:
    """Runs the command that the context names, with the words that follow it."""
    name = str(ctx.command.name)
    if "--help" in ctx.args or "-h" in ctx.args:
        print_command(name, COMMANDS[name])
        return
    try:
        COMMANDS[name].run(*read_settings(COMMANDS[name].config, name, ctx.args))
    except KeyboardInterrupt as error:
        # Typer would end without a word.
        raise StoppedError from error


# Typer finds the command; cli/options.py reads its words, in all the spellings that are allowed.
UNREAD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
app = typer.Typer(cls=_Group, add_completion=False, pretty_exceptions_enable=False)
for _name in COMMANDS:
    app.command(_name, context_settings=UNREAD)(_run)


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
        app()
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
