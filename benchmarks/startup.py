"""From a command to what it first shows: the start-up time of the command line.

python -m benchmarks startup --output benchmarks/results/startup-cpu
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.command import markdown, new_parser, prepare, write

DATA = Path(__file__).parent.parent / "sample_data" / "handwriting" / "train.jsonl"
# Command -> the beginning of the line that is waited for.
COMMANDS = {
    "--version": "vlft",
    "sft --help": "Usage",
    "plan": "deepseek-ai",
    f"sft --dataset {DATA} --max-steps 1": "step 1/1",
}


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        command: of vlft.
        awaited: beginning of the line that is waited for.
        seconds: until it is there, median.
        all_seconds: of each run.
    """

    command: str
    awaited: str
    seconds: float
    all_seconds: list[float]


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    options = new_parser("startup", __doc__, repeats=5).parse_args(arguments)
    _, content = prepare(options)
    results = []
    for command, awaited in COMMANDS.items():
        # The first run reads the libraries from disk.
        found = [seconds_until(command, awaited) for _ in range(options.repeats + 1)][1:]
        shown = command.replace(str(DATA), DATA.name)
        results.append(Result(shown, awaited, statistics.median(found), found))
    write(options.output, {**content, "results": [asdict(r) for r in results]}, table(results))
    print(table(results))


def seconds_until(command: str, awaited: str) -> float:
    """Wall time from the start of a process to a line of its output."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "vlft", *command.split()],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(awaited):
                    seconds = time.perf_counter() - started
                    process.stdout.read()
                    return seconds
    sys.exit(f"{command} never said {awaited!r}: {''.join(lines)}")


def table(results: list[Result]) -> str:
    """The results in Markdown."""
    rows = [[f"`vlft {r.command}`", f"`{r.awaited}`", f"{r.seconds:.2f}"] for r in results]
    return markdown(("command", "until", "s"), rows, words=2)
