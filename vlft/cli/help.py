"""The help pages: one line or two per command or setting, readable at 80 columns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlft.cli.completion import COMMON
from vlft.config import PANELS
from vlft.settings import field_type, flag, is_repeatable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.cli.commands import Command

METAVARS: dict[Any, str] = {int: " N", float: " X", Path: " PATH", str: " TEXT", bool: ""}
Row = tuple[str, str | Text]


def print_overview(purpose: str, commands: Mapping[str, Command]) -> None:
    """Prints the page of ``vlft`` itself."""
    rows: list[Row] = [(name, command.help) for name, command in commands.items()]
    other: list[Row] = [("--version", "Show the version."), ("--help", "Show this page.")]
    _print_page("vlft COMMAND", purpose, {"Commands": rows, "Other": other})
    console = Console(highlight=False)
    console.print("\nvlft COMMAND --help shows what a command takes.")
    console.print("vlft --install-completion has the shell complete commands, flags and words.")


def print_command(name: str, command: Command) -> None:
    """Prints the page of a command: all its settings, by panel."""
    panels: dict[str, list[Row]] = {}
    usage = [f"vlft {name}"]
    for spec in dataclasses.fields(command.config):
        row = (flag_text(command.config, spec), help_text(spec))
        panels.setdefault(spec.metadata["panel"], []).append(row)
        if spec.metadata["argument"]:
            needed = spec.default is None or is_repeatable(command.config, spec.name)
            usage.append(row[0] if needed else f"\\[{row[0]}]")
    order = [*PANELS, *panels]
    panels = {panel: panels[panel] for panel in sorted(panels, key=order.index)}
    panels["Other"] = [
        (f"{name} PATH" if name == "--config" else name, text) for name, text in COMMON.items()
    ]
    _print_page(" ".join(usage), command.help, panels)


def _print_page(usage: str, purpose: str, panels: Mapping[str, list[Row]]) -> None:
    console = Console(highlight=False)
    width = max(len(name) for rows in panels.values() for name, _ in rows)
    console.print(f"[bold]Usage:[/bold] {usage} \\[OPTIONS]\n\n{purpose}")
    for panel, rows in panels.items():
        console.print(f"\n[bold]{panel}[/bold]")
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=width, no_wrap=True, style="cyan")
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(Text(name), text)
        console.print(table)


def flag_text(cls: type, spec: dataclasses.Field[Any]) -> str:
    """The flag with what it takes: ``--lora-rank N``, ``--[no-]use-dora``."""
    if spec.metadata["argument"]:
        return spec.name.upper() + ("..." if is_repeatable(cls, spec.name) else "")
    value_type = field_type(cls, spec.name)
    name = flag(spec.name)
    if value_type is bool:
        name = name.replace("--", "--[no-]", 1)
    metavar = " WORD" if spec.metadata["choices"] else METAVARS[value_type]
    return name + metavar + ("..." if is_repeatable(cls, spec.name) else "")


def help_text(spec: dataclasses.Field[Any]) -> Text:
    """The help line, the allowed words, the default if there is one to show."""
    text, default = Text(spec.metadata["help"]), spec.default
    if spec.metadata["choices"]:
        text.append(f" {' | '.join(spec.metadata['choices'])}", style="green")
    shown = spec.metadata["default_text"]
    if not shown and default not in (None, dataclasses.MISSING):
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        shown = {"True": "on", "False": "off"}.get(shown, shown)
    return text.append(f" [{shown}]", style="dim") if shown else text
