"""The command line in processes of its own that need not import what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def command_line(
    arguments: list[str],
    errors: Path,
    environment: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    """What such a process does."""
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.argv = ["vlft", *arguments]
    if before is not None:
        before()
    from vlft.cli.app import main

    main()


def start(
    arguments: list[str],
    errors: Path,
    before: Callable[[], None] | None = None,
    **environment: str,
) -> multiprocessing.Process:
    """A process that has imported all that a run needs, and nothing else of this one.

    Args:
        arguments: of the command line.
        errors: file that its stderr is added to.
        before: called in the process, first.
        environment: variables to set.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlft.training.run", "peft", "transformers.models.siglip"])
    process = context.Process(target=command_line, args=(arguments, errors, environment, before))
    process.start()
    return process
