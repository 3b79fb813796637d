"""What is shared: a folder, and what its run says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.runs import (
    ADAPTER_WEIGHTS,
    CONFIG,
    PROVENANCE,
    RUN_CONFIG,
    checkpoints_in,
    find_checkpoint,
    is_adapter,
    read_adapter_config,
    read_provenance,
    read_run_config,
)
from vlft.checkpoints.weights import merged_adapters
from vlft.errors import CheckpointError, shown
from vlft.files import digest, read_object, real_path
from vlft.schema import ANY
from vlft.training.plots import METRICS, parse_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.config import SftConfig


@dataclass(frozen=True)
class Source:
    """A folder that is shared.

    Attributes:
        folder: with an adapter or a model.
        is_adapter: which of both.
        settings: of its run; None if there is none.
        origin: of its run: what provenance.json says.
        step: of its checkpoint in the run, if that is known.
        base: the base as the run or the adapter names it; None for a model without a run.
    """

    folder: Path
    is_adapter: bool
    settings: SftConfig | None
    origin: Mapping[str, Any]
    step: int | None
    base: str | None
    rows: tuple[Mapping[str, float], ...] = ()

    @property
    def hub_base(self) -> str | None:
        """The base's id on the hub of Hugging Face, if it has one."""
        base = self.base or ""
        is_id = base.count("/") == 1 and base[0] not in "./~" and not Path(base).exists()
        there = self.settings is None or self.settings.hub == "huggingface"
        return base if is_id and there else None

    @property
    def base_name(self) -> str:
        """The base for people: its id, or the name of its folder."""
        return self.hub_base or (Path(self.base).name if self.base else "unknown")


def open_source(folder: Path, run: Path | None) -> Source:
    """The folder that a path means, and its run.

    Args:
        folder: of a run, whose best checkpoint is meant, of a checkpoint, an adapter or a model.
        run: that is named; None for the one that the folder is in.

    Raises:
        CheckpointError: there is nothing to share, or it is not of the run.
    """
    found = _shared(folder)
    adapter = is_adapter(found)
    home = run or found.parent
    if not (home / RUN_CONFIG).is_file():
        if run is not None:
            hint = "name a run folder of vlft sft"
            raise CheckpointError(f"no {RUN_CONFIG} there", place=shown(run), hint=hint)
        own = read_run_config(found) if (found / RUN_CONFIG).is_file() else None
        base = own.model if own else None
        if adapter and base is None:
            base = read_adapter_config(found).get("base_model_name_or_path")
        return Source(found, adapter, own, {}, None, base)
    settings = read_run_config(home)
    origin = read_provenance(home) if (home / PROVENANCE).is_file() else {}
    step = _step_of(found, home, adapter=adapter)
    return Source(found, adapter, settings, origin, step, settings.model, _evaluations(home))


def _step_of(folder: Path, run: Path, *, adapter: bool) -> int | None:
    """The step of the run's checkpoint that a folder is, or was merged from; None if unknown.

    Raises:
        CheckpointError: it holds an adapter that no checkpoint of the run has.
    """
    number = folder.name.removeprefix("checkpoint-")
    if folder.parent == real_path(run) and number.isdecimal():
        return int(number)
    held = {digest(folder / ADAPTER_WEIGHTS)} if adapter else set(merged_adapters(folder))
    for step, path in checkpoints_in(run):
        if (path / ADAPTER_WEIGHTS).is_file() and digest(path / ADAPTER_WEIGHTS) in held:
            return step
    if held:
        hint = "name the run that it was made by with --run; removed checkpoints are not known"
        raise CheckpointError(
            f"its adapter is of no checkpoint of {shown(run)}", place=shown(folder), hint=hint
        )
    return None


def _shared(folder: Path) -> Path:
    """The folder itself, or the best checkpoint of a run."""
    if folder.is_dir() and (is_adapter(folder) or (folder / CONFIG).is_file()):
        return real_path(folder)
    best = folder / "best"
    return find_checkpoint(best if best.exists() else folder, anywhere=True)


def _evaluations(run: Path) -> tuple[Mapping[str, float], ...]:
    """The lines of metrics.jsonl that tell of an evaluation."""
    path = run / METRICS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = (parse_metrics(line) for line in lines if b'"val_loss"' in line)
    return tuple(row for row in rows if row is not None and "val_loss" in row)


def front_matter(readme: Path) -> dict[str, Any]:
    """The licence that the card of a base states; empty if it states none."""
    import yaml

    if not readme.is_file():
        return {}
    parts = readme.read_text("utf-8", errors="replace").split("---\n", 2)
    try:
        fields = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return {}
    return licence_in(fields) if isinstance(fields, dict) else {}


def licence_in(fields: Mapping[str, Any]) -> dict[str, str]:
    """What the fields of a card say of the licence."""
    names = ("license", "license_name", "license_link")
    return {name: fields[name] for name in names if isinstance(fields.get(name), str)}


def layout_of(folder: Path) -> str:
    """The layout of a model folder: original or transformers."""
    from vlft.families.registry import find_family

    return find_family(read_object(folder / CONFIG, ANY), place=shown(folder / CONFIG))[1]


def as_json(value: Any) -> str:
    """A value of the card's header: JSON is YAML too."""
    return json.dumps(value, ensure_ascii=False)
