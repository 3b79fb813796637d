"""``vlft infer``."""

from __future__ import annotations

from vlft.cli.options import command as make_command
from vlft.cli.quiet import quiet
from vlft.config import InferConfig

HELP = "Answer a data set, or chat, with a tuned or a base model."


def work(config: InferConfig, written: set[str]) -> None:  # noqa: ARG001
    """Answers or chats."""
    quiet()
    from vlft.inference.run import run_infer

    run_infer(config)


command = make_command(InferConfig, work)
