"""The help page of a command: one line or two per setting, grouped, readable at 80 columns."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from vlft.settings import field_type, flag

METAVARS: dict[Any, str] = {int: " N", float: " X", Path: " PATH", str: " TEXT", bool: ""}
FLAG_WIDTH = 28


def help_command(cls: type, help: str) -> type[TyperCommand]:
    """A command class whose ``--help`` is made from the settings dataclass."""

    class SettingsCommand(TyperCommand):
        def get_help(self, ctx: Any) -> str:
            """Prints the page."""
            print_help(cls, ctx.command_path, help)
            return ""

        def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
            """Prints the page, for the releases of click that ask this way."""
            print_help(cls, ctx.command_path, help)

    return SettingsCommand


def print_help(cls: type, command_path: str, help: str) -> None:
    """Prints usage, purpose and all settings by panel."""
    console = Console(highlight=False)
    arguments = [f.name.upper() for f in dataclasses.fields(cls) if f.metadata["argument"]]
    usage = " ".join([command_path, *arguments, "\\[OPTIONS]"])
    console.print(f"[bold]Usage:[/bold] {usage}\n\n{help}")
    panels: dict[str, list[tuple[Text, Text]]] = {}
    for spec in dataclasses.fields(cls):
        row = (Text(flag_text(cls, spec), style="cyan"), help_text(spec))
        panels.setdefault(spec.metadata["panel"], []).append(row)
    panels["Other"] = [
        (Text("--config PATH", style="cyan"), Text("JSON or YAML file of settings; flags win.")),
        (Text("--debug", style="cyan"), Text("Show the traceback of an error.")),
        (Text("--help", style="cyan"), Text("Show this page.")),
    ]
    for panel, rows in panels.items():
        console.print(f"\n[bold]{panel}[/bold]")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=FLAG_WIDTH, no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def flag_text(cls: type, spec: dataclasses.Field[Any]) -> str:
    """The flag with what it takes: ``--lora-rank N``, ``--[no-]use-dora``."""
    if spec.metadata["argument"]:
        return spec.name.upper()
    kind = field_type(cls, spec.name)
    name = flag(spec.name)
    if kind is bool:
        name = name.replace("--", "--[no-]", 1)
    repeatable = typing.get_origin(typing.get_type_hints(cls)[spec.name]) is tuple
    metavar = " WORD" if spec.metadata["choices"] else METAVARS[kind]
    return name + metavar + ("..." if repeatable else "")


def help_text(spec: dataclasses.Field[Any]) -> Text:
    """The help line, the allowed words, the default."""
    text = Text(spec.metadata["help"])
    if spec.metadata["choices"]:
        text.append(f" {' | '.join(spec.metadata['choices'])}", style="green")
    shown = default_text(spec)
    if shown:
        text.append(f" [{shown}]", style="dim")
    return text


def default_text(spec: dataclasses.Field[Any]) -> str:
    """The default as a person reads it; empty if there is none worth a word."""
    shown: str = spec.metadata["shown"]
    if shown or spec.default is None or spec.default is dataclasses.MISSING:
        return shown
    if isinstance(spec.default, bool):
        return "on" if spec.default else "off"
    return f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)
