"""``vlft sft``."""

from __future__ import annotations

import typer

from vlft.cli.options import command as make_command
from vlft.cli.quiet import quiet
from vlft.config import SftConfig

HELP = "Fine-tune a model with LoRA, QLoRA or fully."


def work(config: SftConfig, written: set[str]) -> None:
    """Trains; exit code 130 if the user stopped it."""
    quiet()
    from vlft.training.run import run_sft

    if not run_sft(config, written).finished:
        raise typer.Exit(130)


command = make_command(SftConfig, work)
