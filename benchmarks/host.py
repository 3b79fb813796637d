"""The work of the main thread in a training step, apart from the model: what a GPU would wait for.

Samples are read from files, encoded and packed, and the features of their images, of 1.3b's size,
are looked up as in ``vlft sft``. In the place of the model a step only waits, as for a GPU. Counted
is the processor time of the main thread, which alone starts the kernels of a GPU.

    python -m benchmarks host --output benchmarks/results/host-cpu
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import closing, nullcontext
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from benchmarks.command import new_parser, prepare, publish
from benchmarks.fake import write_fake
from benchmarks.product import write_data
from vlft.checkpoints.locate import describe
from vlft.config import SftConfig
from vlft.distributed import SINGLE
from vlft.training.job import Job
from vlft.training.loop import take_step
from vlft.training.samples import distinct_images, load_data, loop_options, make_planner
from vlft.vision.cache import Images

if TYPE_CHECKING:
    import argparse

    from vlft.training.backend import Backend

WIDTH = 2048
COLUMNS = {
    "samples of a step": "{samples}", "tokens of a sample": "{tokens:.0f}", "rows": "{rows}",
    "main thread, ms a step": "{ms:.1f}", "all threads, ms a step": "{all_ms:.1f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table and the line."""
    parser = new_parser("host", __doc__, repeats=8)
    add = parser.add_argument
    add("--samples", type=int, nargs="+", default=[16, 64], help="of a step; default: 16 64")
    add("--gpu-seconds", type=float, default=0.24, help="that a step waits; default: 0.24")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    results = [run(options, samples) for samples in options.samples]
    publish(options, content, COLUMNS, results)
    told = (f"{found['ms']:.1f} ms per step of {found['samples']} x 650" for found in results)
    print(f"host: {', '.join(told)}")


def run(options: argparse.Namespace, samples: int) -> dict[str, Any]:
    """The figures of steps of some samples, each with an image of its own."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write_fake("deepseek-vl-1.3b-chat", folder / "model", layers=1, weights=False)
        steps = options.repeats + 3
        data = write_data(folder / "data", samples * steps, 1)
        config = SftConfig(
            model=str(folder / "model"), dataset=(str(data),), batch_size=samples,
            val_ratio=0.0, max_steps=steps, tokens_per_microbatch=8192,
        )  # fmt: skip
        job = make_job(config, options.gpu_seconds)
        spent, all_spent, rows = [], [], []
        with closing(job.ahead.steps(job, 0)) as planned:
            for plans in islice(planned, steps):
                rows.append(plans)
                take_step(job, plans)
                spent.append(time.thread_time())
                all_spent.append(time.process_time())
    # The first step is prepared while nothing else is done, and in the last one none is.
    each, of_all = (
        statistics.median(b - a for a, b in pairwise(clock[1:-1])) for clock in (spent, all_spent)
    )
    tokens = sum(plan.sample_tokens for plan in rows[0]) / samples
    return {
        "samples": samples, "tokens": tokens, "rows": len(rows[0]),
        "ms": 1e3 * each, "all_ms": 1e3 * of_all,
    }  # fmt: skip


def make_job(config: SftConfig, seconds: float) -> Job:
    """A job whose model does nothing for so many seconds a step."""
    processor = describe(Path(str(config.model))).processor()
    train, val = load_data(config, processor)
    planner = make_planner(config, processor, train, "cuda")
    features = {
        image.key: torch.zeros(image.tokens, WIDTH, dtype=torch.bfloat16)
        for image in distinct_images((train, val))
    }
    images = Images(processor, "aligned", features)
    options = loop_options(config, planner.schedule)
    return Job(cast("Backend", _Idle(seconds)), images, train, val, planner, options)


class _Idle:
    """A backend that computes nothing."""

    world, device, scales_gradients = SINGLE, torch.device("cpu"), False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.objective = _Objective()
        self.loss = SimpleNamespace(code_loss=torch.zeros(()))

    def zero_grad(self) -> None: ...

    def accumulate(self, **_: Any) -> Any:
        return nullcontext()

    def backward(self, *_: Any, **__: Any) -> None: ...

    def step(self) -> float:
        time.sleep(self.seconds)
        return 1.0


class _Objective(SimpleNamespace):
    def __call__(self, *_: Any) -> torch.Tensor:
        return torch.zeros(())

    def train(self) -> None: ...
