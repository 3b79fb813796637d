"""Memory and time before the first step: a model that is loaded, with LoRA, by vlft and without.

The folder has the shapes of DeepSeek-VL 1.3b with two layers, in bfloat16. Each side loads it in a
process of its own, transformers and peft in their own layout, and then reads every weight once, as
a step does: files that are mapped into memory count as far as they have been read.

    python -m benchmarks load --threads 1 --clock cpu --output benchmarks/results/load-cpu
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from benchmarks.command import new_parser, note, prepare, publish
from benchmarks.fake import write_fake
from benchmarks.measure import GIB, apart, measure
from vlft.checkpoints.convert import convert
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.config import ConvertConfig
from vlft.training.lora import LoraOptions, add_lora

MODEL = "deepseek-vl-1.3b-chat"
COLUMNS = {
    "side": "{side}", "weights, GiB": "{weights:.2f}", "peak, GiB": "{peak:.2f}",
    "of plain's": "{share:.2f}", "s": "{seconds:.2f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, writes the files, prints the table."""
    parser = new_parser("load", __doc__, repeats=1)
    parser.add_argument("--layers", type=int, default=2, help="of the LLM; default: 2")
    options = parser.parse_args(arguments)
    _, content = prepare(options)
    with tempfile.TemporaryDirectory() as home:
        folder, native = Path(home) / "model", Path(home) / "native"
        write_fake(MODEL, folder, options.layers)
        convert(ConvertConfig(src=str(folder), dst=native, format="transformers"))
        weights = (folder / "model.safetensors").stat().st_size / GIB
        results: list[dict[str, Any]] = []
        for side, load, path in (
            ("transformers and peft", plain, native), ("vlft", by_vlft, folder)
        ):  # fmt: skip
            seconds, peak = apart(measured, load, path, options.clock)
            share = peak / (float(results[0]["peak"]) if results else peak)
            results.append(
                {"side": side, "weights": weights, "peak": peak, "share": share, "seconds": seconds}
            )
            note(f"{side}: done")
    publish(options, content, COLUMNS, results)


def measured(load: Any, path: Path, clock: str) -> tuple[float, float]:
    """Seconds and peak GiB of loading and of reading each weight; imports are left out."""
    models: list[Any] = []

    def compute() -> float:
        models.append(load(path))
        return sum(float(weight.sum()) for weight in models[0].parameters())

    found = measure(compute, torch.device("cpu"), clock)
    return found.seconds, found.peak_bytes / GIB


def plain(path: Path) -> Any:
    """The model as transformers loads it, with peft's LoRA."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)
    targets = r".*language_model.*\.(q|k|v)_proj"
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets))


def by_vlft(path: Path) -> Any:
    """The model as a run of ``vlft sft`` loads it, with LoRA."""
    folder = describe(path)
    model = load_model(folder, Placement(torch.device("cpu"), torch.bfloat16))
    return add_lora(model, folder.family, LoraOptions(rank=8))
