"""The one entry point: python -m benchmarks NAME [OPTIONS]."""

from __future__ import annotations

import importlib
import sys

# Name of a module here, which has a main(arguments) -> what it measures.
COMMANDS = {
    "training": "a LoRA job: transformers and peft, padded batches, against vlft",
    "arithmetic": "the operations of such a job, counted",
    "experts": "a mixture-of-experts layer: grouped products against a loop over experts",
    "attention": "attention of a packed row: by trees, a dense mask, FlexAttention",
    "startup": "from a command to what it first shows",
    "plan": "the memory that vlft plan foretells, against the measured peak",
    "quality": "what grouping samples by image costs in learning",
    "loss": "the loss of the targets: vlft's kernel against torch's",
}


def main(arguments: list[str]) -> None:
    """Runs the benchmark that is named, or prints the names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    name, *options = arguments
    if name not in COMMANDS:
        sys.exit(f"found {name!r}, allowed are {', '.join(COMMANDS)}")
    importlib.import_module(f"benchmarks.{name}").main(options)


def overview() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"    {name:{width}}  {title}" for name, title in COMMANDS.items()]
    return "\n".join(["python -m benchmarks NAME [--help | OPTIONS]", "", *lines])


if __name__ == "__main__":
    main(sys.argv[1:])
