"""From a command to its first output: the start-up time of the command line.

python -m benchmarks startup --output benchmarks/results/startup-cpu
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.command import new_parser, prepare, publish

DATA = Path(__file__).parent.parent / "sample_data" / "handwriting" / "train.jsonl"
# Command -> the beginning of the line that is waited for.
COMMANDS = {
    "--version": "vlft",
    "sft --help": "Usage",
    "plan": "deepseek-ai",
    f"sft --dataset {DATA} --max-steps 1": "step 1/1",
}
COLUMNS = {"command": "`vlft {command}`", "until": "`{awaited}`", "s": "{seconds:.2f}"}


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    options = new_parser("startup", __doc__, repeats=5).parse_args(arguments)
    _, content = prepare(options)
    results = []
    for command, awaited in COMMANDS.items():
        # The first run reads the libraries from disk.
        runs = [seconds_until(command, awaited) for _ in range(options.repeats + 1)][1:]
        times = {"seconds": statistics.median(runs), "all_seconds": runs}
        shown = command.replace(str(DATA), DATA.name)
        results.append({"command": shown, "awaited": awaited, **times})
    publish(options, content, COLUMNS, results)


def seconds_until(command: str, awaited: str) -> float:
    """Wall time from the start of a process to a line of its output."""
    arguments = [sys.executable, "-m", "vlft", *command.split()]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with subprocess.Popen(
            arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith(awaited):
                    seconds = time.perf_counter() - started
                    process.stdout.read()
                    return seconds
    sys.exit(f"{command} never said {awaited!r}: {''.join(lines)}")
