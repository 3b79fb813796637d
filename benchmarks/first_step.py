"""The time from the end of imports to step one of ``vlft sft``, on many records and images.

On a busy machine the processor seconds are what the wall clock would show on an idle one, as far as
the work is that of one thread.

The dialogues are those of ``data``, the images photos of 640 x 480, the model is tiny: what is
left is what vlft does before it trains. "Cold" has nothing in the cache; "again" is the same
command once more; for "edited" the data file has got a new record meanwhile, so that its receipt
is not valid while all images are known.

    python -m benchmarks first_step --output benchmarks/results/first-step-cpu
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image

from benchmarks.command import markdown, new_parser, note, prepare, record
from benchmarks.data import TINY, make_data

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTS = ("cold", "again", "edited")
# The command, and a line once everything that it needs is imported.
PROGRAM = (
    "import sys, vlft.training.run; from vlft.cli.app import main; "
    "print('imported', flush=True); sys.exit(main())"
)
COLUMNS = {
    "records": "{records:,}", "images": "{images:,}", "start": "{start}",
    "s to step one": "{seconds:.1f}", "processor s": "{processor:.1f}",
    "images encoded": "{encoded}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files after every start, prints the table."""
    parser = new_parser("first_step", __doc__, repeats=1)
    add = parser.add_argument
    add("--records", type=int, default=100_000)
    add("--images", type=int, default=10_000)
    add("--starts", nargs="+", default=STARTS, choices=STARTS, help="in this order; default: all")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_photos(work / "images", options.images)
        data = make_data(work / "train.jsonl", options.records, options.images)
        for start in options.starts:
            if start == "edited":
                add_record(data)
            found = seconds_to_step_one(TINY, data, options.device)
            named = {"records": options.records, "images": options.images, "start": start}
            record(options, content, COLUMNS, {**named, **found})
    print(markdown(COLUMNS, content["results"]))


def write_photos(folder: Path, count: int) -> None:
    """Distinct images of 640 x 480, about 20 kB each, under the names that ``make_data`` uses."""
    folder.mkdir()
    draw = numpy.random.default_rng(0)
    for number in range(count):
        small = draw.integers(0, 256, (48, 64, 3), dtype=numpy.uint8)
        Image.fromarray(small).resize((640, 480)).save(folder / f"{number}.jpg")


def add_record(data: Path) -> None:
    """Repeats the first record at the end of the file, with another question."""
    with data.open(encoding="utf-8") as file:
        first = file.readline()
    with data.open("a", encoding="utf-8") as file:
        file.write(first.replace("<image>", "<image>Say, ", 1))


def seconds_to_step_one(model: Path, data: Path, device: str) -> dict[str, Any]:
    """Wall time of a run from the end of imports to its first step, after which it is ended."""
    command = ["sft", "--model", str(model), "--dataset", str(data), "--device", device]
    # Ten validation samples: evaluating more before step one would measure the model.
    command += ["--logging-steps", "1", "--no-show-sample", "--val-ratio", "0.0001"]
    started, before, encoded = 0.0, 0.0, "0"
    for line, process in lines_of(command, data.parent):
        now = time.perf_counter()
        if line.startswith("imported"):
            started, before = now, processor_seconds_of(process.pid)
        elif started:
            note(f"    {now - started:6.1f} s  {line.rstrip()[:100]}")
        if " images encoded" in line:
            encoded = line.split(" images encoded")[0].split()[-1]
        if line.startswith("step 1/"):
            used = processor_seconds_of(process.pid) - before
            process.terminate()
            return {"seconds": now - started, "processor": used, "encoded": encoded}
    sys.exit("there was no step one")


def processor_seconds_of(process: int) -> float:
    """Used by a process and its threads so far, see proc_pid_stat(5)."""
    fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def lines_of(command: list[str], folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """What a command of vlft says, line by line, and its process."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            yield line, process
