"""Writes docs/options.md: every setting of every command, from the dataclasses of vlft/config.

python docs/make_options.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.cli.commands import COMMANDS
from vlft.cli.help import flag_text, help_text
from vlft.config import PANELS

if TYPE_CHECKING:
    from vlft.cli.commands import Command

PAGE = Path(__file__).parent / "options.md"
HEAD = """\
# Options

    vlft COMMAND --help

All settings of all commands, with the allowed words and, in brackets, the default. `...` stands
behind what may be given several times. Every command also takes `--config FILE` (JSON or YAML;
flags win), `--debug` (the traceback of an error) and `--help`.
"""


def page() -> str:
    """The text of the page."""
    return HEAD + "".join(_section(name, command) for name, command in COMMANDS.items())


def _section(name: str, command: Command) -> str:
    """The heading and the table of a command."""
    panels: dict[str, list[str]] = {}
    for spec in dataclasses.fields(command.config):
        words = help_text(spec).plain.replace("|", "\\|").replace("<", "&lt;")
        row = f"| `{flag_text(command.config, spec)}` | {words} |"
        panels.setdefault(spec.metadata["panel"], []).append(row)
    order = [*PANELS, *panels]
    rows = [
        f"| **{panel}** | |\n" + "\n".join(panels[panel])
        for panel in sorted(panels, key=order.index)
    ]
    table = "| option | what it does |\n|---|---|\n" + "\n".join(rows)
    return f"\n## vlft {name}\n\n{command.help}\n\n{table}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
