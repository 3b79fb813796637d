"""``vlft convert``."""

from __future__ import annotations

from vlft.cli.options import command as make_command
from vlft.cli.quiet import quiet
from vlft.config import ConvertConfig

HELP = "Write a model in the other layout, the authors' or transformers'."


def work(config: ConvertConfig, written: set[str]) -> None:  # noqa: ARG001
    """Converts and verifies."""
    quiet()
    from vlft.checkpoints.convert import convert

    convert(config)


command = make_command(ConvertConfig, work)
