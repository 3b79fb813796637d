"""``vlft plan``."""

from __future__ import annotations

from vlft.cli.options import command as make_command
from vlft.cli.quiet import quiet
from vlft.config import PlanConfig

HELP = "Say what vlft sft with these flags would do, and the memory that it takes."


def work(config: PlanConfig, written: set[str]) -> None:  # noqa: ARG001
    """Plans."""
    quiet()
    from vlft.planning.report import run_plan

    run_plan(config)


command = make_command(PlanConfig, work)
