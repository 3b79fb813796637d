"""``vlft merge-lora``: base + adapter -> a model that loads like the base did, and is checked."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlft import console
from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.export import check_layout, check_target, export_model, temporary_folder
from vlft.checkpoints.load import DTYPES, Placement, load_model, resolve_placement
from vlft.checkpoints.locate import describe
from vlft.checkpoints.quantize import dequantize_linears
from vlft.checkpoints.tuned import Tuned, open_tuned
from vlft.errors import CheckpointError, ConfigError, VerificationError, shown
from vlft.families.base import keeps_dtype
from vlft.settings import check

if TYPE_CHECKING:
    from vlft.config import MergeLoraConfig
    from vlft.families.processor import Processor

# Largest relative difference of float32 logits that another order of summation explains.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class MergeResult:
    """A merged model, and how much its logits differ from those of base and adapter."""

    folder: Path
    difference: float  # relative


def merge_lora(config: MergeLoraConfig) -> MergeResult:
    """Merges, writes the model, loads what was written and compares its logits.

    Raises:
        VlftError: bad input, or the written model does not compute what base and adapter do.
    """
    config = check(config)
    if config.ckpt_dir is None:
        raise ConfigError("no adapter given", place="--ckpt-dir")
    tuned = open_tuned(
        config.ckpt_dir, model=config.model, revision=config.revision, hub=config.hub
    )
    base, checkpoint = tuned.base, tuned.checkpoint
    if tuned.adapter is None:
        raise CheckpointError(
            "holds a whole model, there is nothing to merge",
            place=str(checkpoint),
            hint=f"use the folder as it is, e.g. vlft infer --model {checkpoint}",
        )
    target = (config.output_dir or checkpoint.with_name(f"{checkpoint.name}-merged")).resolve()
    check_target(target, [base.path, checkpoint], overwrite=config.overwrite)
    placement = resolve_placement(base, dtype="float32", device=config.device, quantize="none")
    layout = base.layout if config.format == "auto" else config.format
    check_layout(base, layout)
    dtype = DTYPES[tuned.settings.dtype if config.dtype == "auto" else config.dtype]
    console.info(f"merging {checkpoint} into {base.path}")
    model, inputs, before = _merge(tuned, placement, config.base)
    for name, parameter in model.named_parameters():
        # Rounded as in the files, so that what is written can be compared with it.
        if not keeps_dtype(name, base.family):
            parameter.data = parameter.data.to(dtype).float()
    rounded = _logits(model, inputs, placement)
    size = config.max_shard_size
    with temporary_folder(target) as part:
        export_model(model, base, part, layout=layout, dtype=dtype, max_shard_size=size)
        del model
        after = _logits(load_model(describe(part), placement), inputs, placement)
        _compare(after, rounded, f"the files in {shown(part)}")
    difference = _relative(after, before)
    console.info(
        f"merged model: {shown(target)} ({layout} layout, {str(dtype).removeprefix('torch.')}); "
        f"its logits differ by {difference:.1e} from those of base and adapter"
    )
    return MergeResult(target, difference)


def load_full_precision(tuned: Tuned, placement: Placement, base: str) -> Any:
    """The base in float32, as in its files (``original``) or as a quantised run computed with it.

    The placement is float32 and not quantised.
    """
    quantize = tuned.settings.quantize
    if quantize == "none" or base == "original":
        return load_model(tuned.base, placement)
    dtype = DTYPES[tuned.settings.dtype]
    trained = Placement(placement.device, dtype, quantize, placement.attn)
    model = load_model(tuned.base, trained)
    dequantize_linears(model)
    return model.float()


def _merge(tuned: Tuned, placement: Placement, base: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    """The merged model, a sample batch, and the batch's logits before merging."""
    adapter = tuned.checkpoint
    peft_model = load_adapter(load_full_precision(tuned, placement, base), adapter)
    with tempfile.TemporaryDirectory() as folder:
        inputs = _sample(tuned.base.processor(), Path(folder))
    before = _logits(peft_model, inputs, placement)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        reason = f"the adapter cannot be merged: {error}"
        raise CheckpointError(reason, place=str(adapter)) from None
    _compare(_logits(merged, inputs, placement), before, "the merged weights")
    return merged, inputs, before


def _sample(processor: Processor, folder: Path) -> dict[str, Tensor]:
    """A batch of one question about an image with many colours and edges."""
    from PIL import Image

    size = 64
    image = Image.new("RGB", (size, size))
    places = [(x, y) for y in range(size) for x in range(size)]
    image.putdata([(4 * x, 4 * y, 255 * ((x // 8 + y // 8) % 2)) for x, y in places])
    path = folder / "sample.png"
    image.save(path)
    row = {"query": "<image>What do you see in 12 words?", "images": [str(path)]}
    inputs = processor.collate([processor.encode(row)])
    del inputs["labels"]
    return inputs


def _logits(model: Any, inputs: dict[str, Tensor], placement: Placement) -> Tensor:
    batch = {name: value.to(placement.device) for name, value in inputs.items()}
    with torch.inference_mode():
        logits: Tensor = model(**batch).logits
    return logits.float().cpu()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises VerificationError if the logits differ; what was written stays for inspection."""
    difference = _relative(found, expected)
    if not difference <= _TOLERANCE:
        raise VerificationError(
            f"their logits differ by {difference:.1e}, at most {_TOLERANCE:.0e} is allowed",
            place=what,
            hint="please report this with the run_config.json",
        )
