"""``vlft merge-lora``: base + adapter -> a model that loads like the base did, and is checked."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlft import console
from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.export import check_layout, export_model
from vlft.checkpoints.load import empty_model, file_dtypes, load_model, rounding_of
from vlft.checkpoints.locate import describe
from vlft.checkpoints.outputs import output_folder
from vlft.checkpoints.placement import DTYPES, Placement, resolve_placement
from vlft.checkpoints.runs import ADAPTER_WEIGHTS
from vlft.checkpoints.stock import check_stock_ids, sample_image
from vlft.checkpoints.tuned import Tuned, open_tuned
from vlft.checkpoints.weights import count_numbers
from vlft.errors import (
    REPORT,
    CheckpointError,
    ConfigError,
    VerificationError,
    explaining_memory,
    shown,
)
from vlft.families.base import keeps_dtype
from vlft.families.image_settings import ImageSettings, state_image_settings
from vlft.files import digest, real_path
from vlft.settings import check
from vlft.vision.encode import on_device

if TYPE_CHECKING:
    from vlft.checkpoints.locate import ModelFolder
    from vlft.config import MergeLoraConfig
    from vlft.families.processor import Processor

# The share of the adapter's effect that rounding may remove before a warning is printed.
_LOSS_SAID = 0.05
SMALLER = "use --device cpu, a machine with more memory, or the adapter unmerged (vlft infer)"
# Largest relative difference of float32 logits that another order of summation explains.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class MergeResult:
    """A merged model, and how close it is to base and adapter.

    Attributes:
        folder: of the model.
        difference: of its logits from those of base and adapter, relative.
        lost: that difference as a share of what the adapter changes.
    """

    folder: Path
    difference: float
    lost: float


@dataclass(frozen=True)
class _Sample:
    """A test batch, its logits from the base alone, and its logits with the adapter."""

    inputs: dict[str, Any]
    base: Tensor
    tuned: Tensor


@explaining_memory("while merging, which is done in float32", SMALLER)
def merge_lora(config: MergeLoraConfig) -> MergeResult:
    """Merges, writes the model, loads what was written and compares its logits.

    Raises:
        VlftError: bad input, or the written model does not compute what base and adapter do.
    """
    config = check(config)
    if config.ckpt_dir is None:
        raise ConfigError("no adapter given", place="--ckpt-dir")
    hub: Any = {"revision": config.revision, "hub": config.hub}
    accept = config.accept_changes
    tuned = open_tuned(config.ckpt_dir, model=config.model, **hub, accept_changes=accept)
    base, checkpoint = tuned.base, tuned.checkpoint
    if tuned.adapter is None:
        raise CheckpointError(
            "holds a whole model, there is nothing to merge",
            place=str(checkpoint),
            hint=f"use the folder as it is, e.g. vlft infer --model {checkpoint}",
        )
    target = real_path(config.output_dir or checkpoint.with_name(f"{checkpoint.name}-merged"))
    placement = resolve_placement(dtype="float32", device=config.device, quantize="none")
    layout = base.layout if config.format == "auto" else config.format
    check_layout(base, layout)
    options: dict[str, Any] = {
        "layout": layout,
        "dtype": None if config.dtype == "auto" else DTYPES[config.dtype],
        "max_shard_size": config.max_shard_size,
        "merged": digest(checkpoint / ADAPTER_WEIGHTS),
    }
    with output_folder(target, [base.path, checkpoint], overwrite=config.overwrite) as part:
        _say_costs(tuned, placement, config)
        model, sample = _merge(tuned, placement, config.base, part)
        # The weights are rounded first, so that the logits of the files must equal these.
        written = _round(model, base, config.dtype)
        rounded = _logits(model, sample.inputs, placement)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(written[name])
        export_model(model, base, part, **options)
        _state_images(part, tuned)
        del model
        gc.collect()  # Modules are in cycles, and would stay beside the model that is loaded now.
        after = _logits(load_model(describe(part), placement), sample.inputs, placement)
        _compare(after, rounded, "the written files")
        check_stock_ids(describe(part))
    return _report(target, layout, after, sample)


def _state_images(folder: Path, tuned: Tuned) -> None:
    """Writes how the images of the run were treated, and says what other tools do not read."""
    settings = ImageSettings.of(tuned.settings)
    state_image_settings(folder, settings, tuned.base.processor(), tuned.settings_file)
    if "exif" in settings.changed:
        console.warn(
            "the model was trained with --exif rotate, which vlft alone reads in its files: turn "
            "images before other tools show them to it"
        )


def _report(target: Path, layout: str, after: Tensor, sample: _Sample) -> MergeResult:
    """Says how close the merged model is to base and adapter."""
    dtype = describe(target).dtype
    effect = float((sample.tuned - sample.base).norm())
    lost = float((after - sample.tuned).norm()) / effect if effect else 0.0
    difference = _relative(after, sample.tuned)
    console.info(
        f"merged model: {shown(target)} ({layout} layout, {dtype}); its logits differ by "
        f"{difference:.1e} from those of base and adapter, {100 * max(0, 1 - lost):.0f} % of the "
        "adapter's effect is left"
    )
    if lost > _LOSS_SAID:
        share = f"{100 * min(1, lost):.0f} % of the adapter's effect"
        console.warn(
            f"rounding to {dtype} loses {share}; use --dtype float32, or the adapter by itself"
        )
    return MergeResult(target, difference, lost)


def _round(model: Any, base: ModelFolder, dtype: str) -> dict[str, torch.dtype]:
    """Rounds the weights to the data types of the files, in float32; returns those data types."""
    dtypes = file_dtypes(base, model)
    for name, parameter in model.named_parameters():
        if dtype != "auto" and not keeps_dtype(name, base.family):
            dtypes[name] = DTYPES[dtype]
        # A tied lm_head is not stored in the files.
        dtypes.setdefault(name, parameter.dtype)
        parameter.data = parameter.data.to(dtypes[name]).float()
    return dtypes


def load_full_precision(tuned: Tuned, placement: Placement, base: str) -> Any:
    """The base in float32, as in its files (``original``) or as a quantised run computed with it.

    The placement is float32 and not quantised.
    """
    quantize = tuned.settings.quantize
    if quantize == "none" or base == "original":
        return load_model(tuned.base, placement)
    return load_model(tuned.base, placement, trained=_placement_of(tuned, placement))


def _placement_of(tuned: Tuned, placement: Placement) -> Placement:
    """That of the run, on the device of another placement."""
    dtype, quantize = tuned.settings.dtype, tuned.settings.quantize
    return resolve_placement(dtype=dtype, device=placement.device.type, quantize=quantize)


def _say_costs(tuned: Tuned, placement: Placement, config: MergeLoraConfig) -> None:
    """Says beforehand what merging takes: memory, and for QLoRA the time to quantise."""
    base, mib = tuned.base, 4 * count_numbers(tuned.base.path) / 2**20
    console.info(
        f"merging {shown(tuned.checkpoint)} into {shown(base.path)}, in float32: "
        + (f"{mib / 2**10:.1f} GiB" if mib >= 2**10 else f"{mib:.0f} MiB")
        + f" of memory, beside one weight file (--max-shard-size {config.max_shard_size})"
    )
    if tuned.settings.quantize != "none" and config.base == "dequantized":
        model = empty_model(base)
        seconds = rounding_of(model, base, _placement_of(tuned, placement)).seconds(model)
        about = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        console.info(f"quantising its weights as in training takes about {about}")


def _merge(tuned: Tuned, placement: Placement, base: str, part: Path) -> tuple[Any, _Sample]:
    """Merges the adapter; returns the model, and the logits of a test batch from before merging.

    The image of the batch is for a moment in the folder ``part``, which is swept after a kill.
    """
    adapter = tuned.checkpoint
    model = load_full_precision(tuned, placement, base)
    with tempfile.TemporaryDirectory(dir=part) as folder:
        inputs = _sample(tuned.base.processor(), Path(folder))
    # Computed before the adapter is loaded: pissa and olora change the base when they are loaded.
    alone = _logits(model, inputs, placement)
    peft_model = load_adapter(model, adapter)
    sample = _Sample(inputs, alone, _logits(peft_model, inputs, placement))
    _check_finite(sample, tuned)
    merged = put_into(peft_model, adapter)
    _compare(_logits(merged, inputs, placement), sample.tuned, "the merged weights")
    return merged, sample


def _check_finite(sample: _Sample, tuned: Tuned) -> None:
    """Raises CheckpointError if the logits of the base or of the adapter on it are no numbers."""
    found = "its scores are no numbers (NaN or infinite)"
    if not sample.base.isfinite().all():
        hint = "its weights may be damaged: compare them with the original"
        raise CheckpointError(found, place=shown(tuned.base.path), hint=hint)
    if not sample.tuned.isfinite().all():
        hint = "train it again, with a lower learning rate, or take an earlier checkpoint"
        place = shown(tuned.checkpoint / ADAPTER_WEIGHTS)
        raise CheckpointError(f"with this adapter the model fails: {found}", place=place, hint=hint)


def put_into(peft_model: Any, adapter: Path) -> Any:
    """The base of peft's model with the weights of the adapter added to its own.

    Raises:
        CheckpointError: a sum is infinite or NaN.
    """
    try:
        return peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        reason = f"the adapter cannot be merged: {error}"
        hint = "train it again, with a lower learning rate, or take an earlier checkpoint"
        raise CheckpointError(reason, place=shown(adapter / ADAPTER_WEIGHTS), hint=hint) from None


def _sample(processor: Processor, folder: Path) -> dict[str, Any]:
    """A batch of one question about an image with many colours and edges."""
    row = {"query": "<image>What do you see in 12 words?", "images": [str(sample_image(folder))]}
    inputs = processor.collate([processor.encode(row)])
    del inputs["labels"]
    return inputs


def _logits(model: Any, inputs: dict[str, Any], placement: Placement) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(**on_device(inputs, placement.device)).logits
    return logits.float().cpu()


def _relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of what is expected, unless that is all zeros."""
    return float((found - expected).norm() / (expected.norm() or 1.0))


def _compare(found: Tensor, expected: Tensor, what: str) -> None:
    """Raises VerificationError if the logits differ."""
    difference = _relative(found, expected)
    if not difference <= _TOLERANCE:
        raise VerificationError(
            f"their logits differ by {difference:.1e}, at most {_TOLERANCE:.0e} is allowed",
            place=what,
            hint=f"{REPORT} and the run_config.json",
        )
