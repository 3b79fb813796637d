"""GPU memory that tuning the published checkpoints needs, by arithmetic on the meta device.

No weight is made: the models are built without storage from the published configs, and their
tensors are counted. What a step adds is bounded by the formulas below.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from tests.published import PUBLISHED, Published
from vlft.checkpoints.load import empty_model
from vlft.checkpoints.locate import ModelFolder
from vlft.families.base import is_in
from vlft.families.table import find_family
from vlft.models.experts import PLAIN_EXPERTS
from vlft.training.lora import LoraOptions, resolve_targets
from vlft.training.loss import CHUNK

if TYPE_CHECKING:
    from collections.abc import Sequence

GIB = 2**30

# nf4: half a byte, a byte of scale per 64, four bytes of second scale per 64 * 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# A trained number is held, with its gradient and Adam's two moments, in float32.
TRAINED_BYTES = 16
# bfloat16.
PLAIN_BYTES = 2


@dataclass(frozen=True)
class Need:
    """Bytes.

    Attributes:
        plain: all weights in bfloat16.
        quantized: the LLM's linear layers and experts in nf4, the rest in bfloat16.
        trained: adapter, gradients, moments.
        step: activations of a row, with gradient checkpointing.
        dequantized: the largest weight that nf4 unpacks at once.
    """

    plain: float
    quantized: float
    trained: float
    step: float
    dequantized: float


def open_published(published: Published) -> tuple[ModelFolder, Any]:
    """Folder and model, on the meta device."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        (path / "config.json").write_text(json.dumps(published.config))
        family, layout = find_family(published.config, place=published.name)
        folder = ModelFolder(path, published.name, dict(published.config), family, layout)
        return folder, empty_model(folder, image_token_id=1)


def need(folder: ModelFolder, model: Any, options: LoraOptions, tokens: int) -> Need:
    """The memory of a run with rows of so many tokens."""
    parts = folder.family.parts
    total = sum(p.numel() for p in model.parameters())
    quantized = sum(
        parameter.numel()
        for name, module in model.named_modules()
        if is_in(name, [parts.language]) and isinstance(module, nn.Linear | PLAIN_EXPERTS)
        for parameter in module.parameters(recurse=False)
    )
    return Need(
        plain=PLAIN_BYTES * total,
        quantized=PLAIN_BYTES * (total - quantized) + NF4_BYTES * quantized,
        trained=TRAINED_BYTES * adapter_size(folder, model, options),
        step=step_bytes(model.config.text_config, tokens),
        dequantized=dequantized_bytes(model.config.text_config),
    )


def adapter_size(folder: ModelFolder, model: Any, options: LoraOptions) -> int:
    """Numbers in the adapter."""
    targets = resolve_targets(model, folder.family, options)
    shapes = [model.get_submodule(name).weight.shape for name in targets.modules]
    size = sum(options.rank * (outputs + inputs) for outputs, inputs in shapes)
    for name in targets.parameters:
        count, outputs, inputs = model.get_parameter(name).shape
        size += count * options.rank * (outputs + inputs)
    return size


def step_bytes(text: Any, tokens: int) -> float:
    """Activations of a packed row: an input per layer, one layer in full, one chunk of logits."""
    kept = text.num_hidden_layers * tokens * text.hidden_size * PLAIN_BYTES
    heads = text.num_attention_heads
    size = getattr(text, "qk_head_dim", None) or text.hidden_size // heads
    attention = 4 * tokens * max(heads * size, text.hidden_size) + tokens * tokens
    inner = 3 * tokens * text.intermediate_size
    if getattr(text, "n_routed_experts", None):
        rows = tokens * text.num_experts_per_tok
        # Two of D in the model's dtype, and their weighted product in float32.
        routed = rows * (3 * text.moe_intermediate_size + 4 * text.hidden_size)
        inner = max(inner, routed)
    # Forward and gradient.
    layer = 2 * PLAIN_BYTES * (attention + inner)
    logits = 3 * CHUNK * text.vocab_size * 4
    return float(kept + layer + logits)


def dequantized_bytes(text: Any) -> float:
    """The gate and up projections of a layer's experts, else the widest linear layer."""
    size = text.hidden_size * text.intermediate_size
    if getattr(text, "n_routed_experts", None):
        size = text.n_routed_experts * 2 * text.moe_intermediate_size * text.hidden_size
    return float(PLAIN_BYTES * size)


def table(rows: Sequence[tuple[str, Need, Need]]) -> str:
    """The result as Markdown, in GiB."""
    lines = [
        "| checkpoint | weights, bf16 | weights, nf4 | LoRA `qkv` | QLoRA `qkv` | LoRA `ALL` | "
        "QLoRA `ALL` |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, qkv, every in rows:
        cells = [qkv.plain, qkv.quantized]
        for found in (qkv, every):
            added = found.trained + found.step
            cells += [found.plain + added, found.quantized + added + found.dequantized]
        lines.append(f"| `{name}` | " + " | ".join(f"{cell / GIB:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of a packed row")
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    rows = []
    for published in PUBLISHED:
        folder, model = open_published(published)
        needs = [
            need(folder, model, LoraOptions(target, rank=arguments.rank), arguments.tokens)
            for target in ("qkv", "ALL")
        ]
        rows.append((published.name.split("/")[1], needs[0], needs[1]))
    print(table(rows))


if __name__ == "__main__":
    main()
