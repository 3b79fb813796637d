"""``vlft``: the application, and the one place where errors become text and exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from vlft import __version__
from vlft.cli import cache, convert, infer, merge_lora, models, plan, sft
from vlft.cli.help import help_command
from vlft.config import ConvertConfig, InferConfig, MergeLoraConfig, PlanConfig, SftConfig
from vlft.console import err, show_error
from vlft.errors import UsageError, VlftError, shown

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

app = typer.Typer(
    help="Fine-tune, run and merge DeepSeek's vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("sft", help=sft.HELP, cls=help_command(SftConfig, sft.HELP))(sft.command)
app.command("plan", help=plan.HELP, cls=help_command(PlanConfig, plan.HELP))(plan.command)
app.command("infer", help=infer.HELP, cls=help_command(InferConfig, infer.HELP))(infer.command)
app.command("merge-lora", help=merge_lora.HELP, cls=help_command(MergeLoraConfig, merge_lora.HELP))(
    merge_lora.command
)
app.command("convert", help=convert.HELP, cls=help_command(ConvertConfig, convert.HELP))(
    convert.command
)
app.command("models", help=models.HELP)(models.command)
app.add_typer(cache.app, name="cache")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"vlft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options before the command."""


def _file_error(error: OSError) -> VlftError:
    """What the system has against a file that no command checked: a path, a right, a full disk."""
    reason = str(error.strerror or error).split("\n")[0]
    place = shown(error.filename) if isinstance(error.filename, str) else ""
    wrong_path = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, (*wrong_path, PermissionError)):
        hint = "name another path; --debug shows what it is needed for"
        return UsageError(f"cannot be used ({reason})", place=place, hint=hint)
    return VlftError(reason, place=place, hint="--debug shows the traceback")


def _is_said_elsewhere(error: VlftError) -> bool:
    """Whether another process says it: all find a user's mistake, the first of a machine speaks."""
    return isinstance(error, UsageError) and os.environ.get("LOCAL_RANK", "0") != "0"


def _pass_on(dropped: UnraisableHookArgs) -> None:
    """Has a Ctrl-C come again that Python dropped, as it does with all that a callback raises."""
    if dropped.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)


def main() -> None:
    """Runs the command line; a user's mistake is text and an exit code, never a traceback."""
    sys.unraisablehook = _pass_on
    debug = "--debug" in sys.argv
    try:
        app()
    except VlftError as error:
        if debug:
            err.print_exception()
        if not _is_said_elsewhere(error):
            show_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if debug:
            err.print_exception()
        failed = _file_error(error)
        show_error(str(failed))
        sys.exit(failed.exit_code)
    except KeyboardInterrupt:
        if debug:
            err.print_exception()
        show_error("stopped; what was saved before is whole")
        sys.exit(130)
