"""vlft against the loops that people run: an expert's own, and TRL's SFTTrainer at its best.

TRL is not installed with vlft: ``pip install trl==1.16.0``. It trains without checkpointing, and in
its compact form, which scores targets alone; without Triton it would score every position.

    python -m benchmarks peers --threads 1 --clock cpu --output benchmarks/results/peers-cpu
    python -m benchmarks peers --scale deepseek-vl-1.3b-chat --dtypes bfloat16 \\
        --output benchmarks/results/gpu-peers
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.command import changed, markdown, new_parser, note, prepare, write
from benchmarks.samples import WORKLOADS
from benchmarks.sides import Loop, make_samples
from benchmarks.training import COLUMNS, compare

if TYPE_CHECKING:
    import argparse

    from benchmarks.sides import Side
    from vlft.data.encode import EncodedSample

MODEL = "deepseek-vl"
TOLD = ("q1", "q5", "caption", "mixed")


def main(arguments: list[str]) -> None:
    """Measures, writes the files after every workload, prints the table and the speed-ups."""
    parser = new_parser("peers", __doc__, repeats=1)
    add = parser.add_argument
    names = list(WORKLOADS)
    default = ["q1", "q2", "q5", "caption", "mixed", "text"]
    add("--workloads", nargs="+", default=default, choices=names, help=f"default: {default}")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], help="default: both")
    shown = "of the model: middle, tiny for a quick look, or a published one; default: middle"
    add("--scale", default="middle", help=shown)
    add("--samples", type=int, default=10, help="of an optimiser step; default: 10")
    add("--epochs", type=int, default=3, help="of a job; default: 3")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    content["comparisons"] = []
    lines = []
    for dtype in options.dtypes:
        speedups = {}
        for workload in options.workloads:
            case = changed(options, model=MODEL, workload=workload, dtype=dtype, batch=[1, 2])
            found = compare(case, trl_side)
            content["comparisons"].append({"dtype": dtype, **found})
            write(options.output, content, table_of(content))
            note(f"{dtype}, {workload}: done")
            speedups[workload] = found["results"][-1]["speedup"]
        told = ", ".join(f"{name} {speedups[name]:.2f}" for name in TOLD if name in speedups)
        count = {1: "one epoch", 3: "three epochs"}.get(options.epochs, f"{options.epochs} epochs")
        lines.append(f"{count} against strong: {told} ({dtype})")
    table = "\n".join([table_of(content), "", *lines])
    write(options.output, content, table)
    print(table)


def table_of(content: dict[str, Any]) -> str:
    """The table of all results so far."""
    rows = [{**one, **result} for one in content["comparisons"] for result in one["results"]]
    return markdown({"dtype": "{dtype}", **COLUMNS}, rows)


def trl_side(case: argparse.Namespace) -> Side:
    """TRL's trainer on the samples of a workload."""
    built, samples = make_samples(case, plain=True)
    return TrlLoop(built, samples, 1).side("TRL")


@dataclass
class TrlLoop(Loop):
    """The forward and backward passes of TRL's trainer.

    Attributes:
        trainer: TRL's, around peft's model.
    """

    trainer: Any = field(default=None)

    def __post_init__(self) -> None:
        from datasets import Dataset
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast
        from trl import SFTConfig, SFTTrainer
        from trl.trainer import utils

        utils._use_triton = lambda _device: True
        # The trainer asks for a tokenizer and data, but its batches are those of the other loops.
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")),
            pad_token="<pad>", eos_token="<pad>",
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})
        weight = self.built.weight
        config = SFTConfig(
            tempfile.mkdtemp(), use_cpu=weight.device.type == "cpu", max_length=None,
            gradient_checkpointing=False, bf16=weight.dtype is torch.bfloat16, report_to=[],
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        self.trainer = SFTTrainer(
            self.built.tuned, config, train_dataset=data, processing_class=tokenizer
        )
        self.trainer.current_gradient_accumulation_steps = len(self.batches())

    def epoch(self) -> float:
        """See Loop."""
        targets, total = torch.tensor(self.samples.targets), 0.0
        for batch in self.batches():
            with self.autocast():
                loss = self.trainer.training_step(self.built.tuned, self.collated(batch), targets)
            total += loss.item()
        return total

    def collated(self, batch: list[EncodedSample]) -> dict[str, Tensor]:
        """The inputs of the trainer: padded ids and labels, and pixels."""
        ids, mask, labels = self.padded(batch)
        images = [image for sample in batch for image in sample.images]
        return {**self.inputs(ids, images), "attention_mask": mask, "labels": labels}
