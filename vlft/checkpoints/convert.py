"""``vlft convert``: a model folder -> the same model in the other layout or in other shards."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vlft import console
from vlft.checkpoints.export import check_layout, export_model
from vlft.checkpoints.load import load_model, native_tensors
from vlft.checkpoints.locate import describe, locate_model
from vlft.checkpoints.outputs import output_folder
from vlft.checkpoints.placement import DTYPES, Placement
from vlft.checkpoints.stock import check_stock_ids
from vlft.errors import REPORT, ConfigError, VerificationError, shown
from vlft.families.base import keeps_dtype
from vlft.files import real_path
from vlft.settings import check

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from vlft.checkpoints.locate import ModelFolder
    from vlft.config import ConvertConfig


def convert(config: ConvertConfig) -> Path:
    """The new folder. Reads a model, writes it, reads what was written and compares every bit.

    Raises:
        VlftError: bad input, or what was written is not what was read.
    """
    config = check(config)
    if config.src is None or config.dst is None:
        raise ConfigError("no folders given", place="SRC DST")
    base = locate_model(config.src, revision=config.revision, hub=config.hub)
    if config.model_roles != "auto":
        base = _with_roles(base, config.model_roles)
    check_layout(base, config.format)
    target = real_path(config.dst)
    dtype = None if config.dtype == "auto" else DTYPES[config.dtype]
    size = config.max_shard_size
    with output_folder(target, [base.path], overwrite=config.overwrite, flag="DST") as part:
        console.info(f"reading {shown(base.path)}: {base.family.title}, {base.layout} layout")
        model = load_model(base, Placement(torch.device("cpu"), torch.float32), keep_dtypes=True)
        export_model(model, base, part, layout=config.format, dtype=dtype, max_shard_size=size)
        written = describe(part)
        _compare(model, written, dtype)
        check_stock_ids(written)
    console.info(f"written and compared: {shown(target)} ({config.format} layout)")
    return target


def _with_roles(base: ModelFolder, kind: str) -> ModelFolder:
    if kind not in base.family.roles_by_kind:
        raise ConfigError(
            f"{base.family.title} has one pair of roles",
            place=f"--model-roles {kind}",
            hint="leave it out",
        )
    return replace(base, roles=base.family.roles_by_kind[kind])


def _compare(model: PreTrainedModel, written: ModelFolder, dtype: torch.dtype | None) -> None:
    """Raises VerificationError if a tensor of the files is not the model's."""
    expected = dict(model.named_parameters())
    for name, tensor in native_tensors(written, model):
        as_read = dtype is None or keeps_dtype(name, written.family)
        written_dtype = tensor.dtype if as_read else dtype
        if not torch.equal(tensor, expected.pop(name).to(written_dtype)):
            raise VerificationError(
                "the file does not hold what was read",
                place=f"{shown(written.path)}: {name}",
                hint=REPORT,
            )
    if model.config.tie_word_embeddings:
        expected.pop(f"{written.family.parts.head}.weight", None)
    if expected:
        raise VerificationError(
            f"{len(expected)} tensors were not written: {', '.join(list(expected)[:3])}",
            place=shown(written.path),
            hint=REPORT,
        )
