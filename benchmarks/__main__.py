"""The entry point: python -m benchmarks NAME [OPTIONS]."""

from __future__ import annotations

import importlib
import sys

# Name of a module here, which has a main(arguments) -> what it measures.
BENCHMARKS = {
    "training": "a LoRA job: an expert's loop over transformers and peft, against vlft",
    "peers": "the same job by TRL's trainer too, in float32 and bfloat16",
    "plot": "draws the speed-ups that peers measured",
    "arithmetic": "the floating point operations of such a job, counted",
    "plan": "the peak memory that vlft plan predicts, against the measured peak",
    "attention": "attention of a packed row: segments, a dense mask, FlexAttention",
    "step": "optimiser steps of the published models at their true sizes",
    "product": "vlft sft and vlft infer themselves: time to step one, GPU busy, images/s",
    "infer": "answers to questions on images: transformers' generate, against vlft",
    "host": "the main thread's work in a step, apart from the model",
    "draw": "drawings: transformers' own generate, against vlft",
    "fake": "a model folder with the shapes of a published model and random weights",
    "experts": "a mixture-of-experts layer: grouped products against a loop over experts",
    "loss": "the loss: vlft's chunks against torch's linear_cross_entropy",
    "startup": "the time from a command to its first output",
    "first_step": "from the end of imports to step one, on 100,000 records and 10,000 images",
    "load": "memory and time of loading a model, before the first step",
    "data": "the checks of data before the first step: time and memory, 10^3 to 10^6 records",
    "quality": "what grouping samples by image costs in learning",
}


def main(arguments: list[str]) -> None:
    """Runs the benchmark that is named, or prints the names."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, BENCHMARKS))
        print("python -m benchmarks NAME [--help | OPTIONS]\n")
        print("\n".join(f"    {name:{width}}  {title}" for name, title in BENCHMARKS.items()))
        return
    name, *options = arguments
    if name not in BENCHMARKS:
        sys.exit(f"found {name!r}, allowed are {', '.join(BENCHMARKS)}")
    importlib.import_module(f"benchmarks.{name}").main(options)


if __name__ == "__main__":
    main(sys.argv[1:])
