"""``vlft merge-lora``."""

from __future__ import annotations

from vlft.cli.options import command as make_command
from vlft.cli.quiet import quiet
from vlft.config import MergeLoraConfig

HELP = "Add an adapter to its base and write a model that loads like the base did."


def work(config: MergeLoraConfig, written: set[str]) -> None:  # noqa: ARG001
    """Merges and verifies."""
    quiet()
    from vlft.checkpoints.merge import merge_lora

    merge_lora(config)


command = make_command(MergeLoraConfig, work)
