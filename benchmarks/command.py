"""What all benchmarks share: options, result files, Markdown tables."""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import CLOCKS, machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NUMBER = re.compile(r"-?\d[\d.]*(e[+-]?\d+)?")


def new_parser(name: str, description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; the description is its module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, choices=["cpu", "cuda"], help=f"default: {default}")
    add("--threads", type=int, help="torch threads; default: torch's choice")
    add("--clock", default="wall", choices=sorted(CLOCKS), help="default: wall")
    add("--repeats", type=int, default=repeats, help=f"after a warm-up; default: {repeats}")
    add("--output", type=Path, help="path without suffix; PATH.json and PATH.md are written")
    return parser


def prepare(options: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """Sets the process up to measure; returns the device, and the head of the result file."""
    if options.threads:
        torch.set_num_threads(options.threads)
    # The garbage collection before each measurement need not look through imported modules.
    gc.freeze()
    device = torch.device(options.device)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    return device, {"machine": machine(device), "settings": settings}


def changed(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """The options with some changed or added."""
    return argparse.Namespace(**{**vars(options), **changes})


def write(output: Path | None, content: Mapping[str, Any], table: str) -> None:
    """Writes OUTPUT.json and OUTPUT.md, if there is an output."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        # JSON has no nan.
        valid = json.loads(json.dumps(content), parse_constant=lambda _: None)
        for suffix, text in (("json", json.dumps(valid, indent=2)), ("md", table)):
            output.with_name(f"{output.name}.{suffix}").write_text(f"{text}\n", "utf-8")


def record(
    options: argparse.Namespace,
    content: dict[str, Any],
    columns: Mapping[str, str],
    result: Mapping[str, Any],
) -> None:
    """Adds a result and writes the files at once, so that whatever stops the rest loses none."""
    results = content.setdefault("results", [])
    results.append(result)
    write(options.output, content, markdown(columns, results))
    note(", ".join(str(value) for value in result.values() if isinstance(value, str)))


def publish(
    options: argparse.Namespace,
    content: Mapping[str, Any],
    columns: Mapping[str, str],
    results: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the files and prints the table of all results."""
    table = markdown(columns, results)
    write(options.output, {**content, "results": results}, table)
    print(table)


def markdown(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of title -> format of the cell, as in ``{seconds:.2f}``; numbers to the right."""
    cells = [[text.format_map(row) for text in columns.values()] for row in rows]
    rule = [
        "---:" if all(map(NUMBER.fullmatch, column)) else "---"
        for column in zip(*cells, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *cells))


def note(text: str) -> None:
    """Reports progress on stderr, apart from the table."""
    print(text, file=sys.stderr, flush=True)
