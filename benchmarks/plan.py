"""The memory that ``vlft plan`` foretells, against the measured peak of training.

Measured is all that a process holds beside its libraries: model, LoRA, optimiser, and two steps on
rows of the workload. Each model and workload runs in a process of its own.

    python -m benchmarks plan --output benchmarks/results/plan-cpu
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from benchmarks.command import DTYPES, markdown, new_parser, note, prepare, write
from benchmarks.comparison import GIB
from benchmarks.measure import apart, measure
from benchmarks.models import native_config, random_model
from benchmarks.samples import random_samples
from benchmarks.shapes import SCALES
from benchmarks.sides import vlft_side
from benchmarks.workloads import WORKLOADS
from vlft.config import JOINED_TOKENS, TOKENS_PER_ROW
from vlft.packing.packer import Packer
from vlft.planning.memory import MemorySpec, memory
from vlft.planning.sizes import language_params, lm_head_params, text_sizes, tower_scores
from vlft.training.optim import make_optimizer

if TYPE_CHECKING:
    from benchmarks.models import RandomModel
    from benchmarks.shapes import Shape

SAMPLES = 10


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        model: by name.
        workload: by name.
        checkpointing: whether activations are recomputed.
        tokens: of the longest row.
        planned_gib: by arithmetic.
        measured_gib: the peak.
    """

    model: str
    workload: str
    checkpointing: bool
    tokens: int
    planned_gib: float
    measured_gib: float


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("plan", __doc__, repeats=1)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="default: float32")
    parser.add_argument("--scale", default="middle", choices=SCALES)
    parser.add_argument("--workloads", nargs="+", default=["q5", "mixed"])
    options = parser.parse_args(arguments)
    device, content = prepare(options)
    results = []
    for name in SCALES[options.scale]:
        for workload in options.workloads:
            for checkpointing in (False, True):
                case = (name, options.scale, workload, options.dtype, str(device), checkpointing)
                results.append(apart(run, *case))
                note(f"{name}, {workload}: done")
    write(options.output, {**content, "results": [asdict(r) for r in results]}, table(results))
    print(table(results))


def run(
    name: str, scale: str, workload: str, dtype: str, device: str, checkpointing: bool
) -> Result:
    """Plans and measures one case."""
    case = Case(SCALES[scale][name], workload, DTYPES[dtype], torch.device(device), checkpointing)
    # All libraries are loaded then, and counted as held before.
    train(replace(case, shape=SCALES["tiny"][name]))
    found: list[RandomModel] = []

    def compute() -> float:
        built, tokens = train(case)
        found.append(built)
        return tokens

    measured = measure(compute, case.device)
    tokens = int(measured.value)
    asked = MemorySpec(checkpointing=checkpointing, tokens=tokens, cuda=device == "cuda")
    planned = plan(found[0], asked)
    return Result(name, workload, checkpointing, tokens, planned / GIB, measured.peak_bytes / GIB)


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        shape: of the model.
        workload: by name.
        dtype: of frozen weights.
        device: where.
        checkpointing: whether activations are recomputed.
    """

    shape: Shape
    workload: str
    dtype: torch.dtype
    device: torch.device
    checkpointing: bool


def train(case: Case) -> tuple[RandomModel, int]:
    """Makes a model and takes two steps; returns it, and the tokens of the longest row."""
    built = random_model(case.shape, case.dtype, case.device)
    if case.checkpointing:
        built.language.activation_checkpointing_enable({"use_reentrant": False})
        built.language.disable_input_require_grads()
    job = random_samples(WORKLOADS[case.workload], built, SAMPLES)
    limit = TOKENS_PER_ROW[case.device.type]
    side = vlft_side(built, job, limit)
    packer = Packer(case.shape.image_token_id, limit, JOINED_TOKENS[case.device.type])
    rows = packer.rows(job.samples)
    optimizer = make_optimizer(built.model, 1e-4, 0.1)
    if side.encode is not None:
        side.encode()
    for _ in range(2):
        side.epoch()
        optimizer.step()
        optimizer.zero_grad()
    return built, max(map(len, rows))


def plan(built: RandomModel, asked: MemorySpec) -> float:
    """Bytes at the peak, by arithmetic; without CUDA's own, which are not measured either."""
    text = text_sizes({**built.model.config.text_config.to_dict(), "tie_word_embeddings": False})
    total = sum(p.numel() for p in built.model.parameters() if not p.requires_grad)
    others = total - language_params(text) - lm_head_params(text)
    scores = tower_scores(native_config(built.shape))
    asked = replace(asked, width=built.weight.element_size(), scores=scores)
    found = memory(text, others, built.family.attention_inputs, asked)
    return found.peak - found.runtime


def table(results: list[Result]) -> str:
    """The results in Markdown."""
    columns = (
        "model", "workload", "checkpointing", "tokens of a row", "planned, GiB", "measured, GiB",
        "planned / measured",
    )  # fmt: skip
    rows = [
        [
            r.model,
            r.workload,
            "yes" if r.checkpointing else "no",
            str(r.tokens),
            f"{r.planned_gib:.2f}",
            f"{r.measured_gib:.2f}",
            f"{r.planned_gib / r.measured_gib:.2f}",
        ]
        for r in results
    ]
    return markdown(columns, rows, words=3)
