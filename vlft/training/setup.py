"""Given settings -> checked settings, with the base model found but not loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.locate import ModelFolder, locate_model
from vlft.checkpoints.placement import Placement, resolve_placement
from vlft.checkpoints.runs import RUN_CONFIG
from vlft.checkpoints.tuned import open_tuned
from vlft.config import LEARNING_RATES, TOKENS_PER_ROW
from vlft.data.mix import resolved_mix
from vlft.data.specs import expand
from vlft.errors import ConfigError, shown
from vlft.evaluation.own import ENDING, find_metrics
from vlft.families.image_settings import ImageSettings
from vlft.settings import check
from vlft.training.resume import Resumed, resumed_config

if TYPE_CHECKING:
    from collections.abc import Collection

    from vlft.config import SftConfig
    from vlft.errors import CheckpointError
    from vlft.families.processor import Processor


@dataclass(frozen=True)
class Setup:
    """What a run starts from, all of it checked.

    Attributes:
        config: with absolute paths, and every ``auto`` resolved that needs no model.
        folder: of the base model.
        processor: of the base model.
        placement: where and how the model is held.
        resumed: the checkpoint to go on from, if any, and what changes in the run's course.
        changed: what has changed since that run was started, and is accepted.
    """

    config: SftConfig
    folder: ModelFolder
    processor: Processor
    placement: Placement
    resumed: Resumed | None
    changed: tuple[CheckpointError, ...] = ()

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None for a new run."""
        return None if self.resumed is None else self.resumed.checkpoint

    @property
    def model_name(self) -> str:
        """The name of the folder that holds the model's runs."""
        # Made absolute first: the model may be given as "..".
        name = Path(os.path.abspath(self.folder.name)).name  # noqa: PTH100
        return "".join(mark if mark.isprintable() else "_" for mark in name) or "model"


def check_settings(config: SftConfig, explicit: Collection[str] | None) -> Setup:
    """The settings checked and resolved, and the base model found.

    Args:
        config: as given.
        explicit: see run_sft.

    Raises:
        UsageError: a setting is not allowed, or does not fit the resumed run or this machine.
    """
    resumed: Resumed | None = None
    config = check(config)
    if config.resume is not None:
        config, resumed = resumed_config(config, explicit)
    elif config.adapter is not None:
        config = _with_base(config, config.adapter)
    config = _absolute(config)
    _check_tracker(config.report_to)
    if config.eval_metric is not None:
        find_metrics([config.eval_metric])
    folder = locate_model(config.model, revision=config.revision, hub=config.hub)
    if resumed is None:
        _try_output(config.output_dir)
    placement = resolve_placement(
        dtype=config.dtype,
        device=config.device,
        quantize=config.quantize,
        attn=config.attn,
    )
    processor = (
        ImageSettings.of(config)
        .apply(folder.processor(), resumed.checkpoint / RUN_CONFIG if resumed else None)
        .with_special_tokens(config.special_tokens)
    )
    return Setup(_resolved(config, placement), folder, processor, placement, resumed)


def _with_base(config: SftConfig, adapter: Path) -> SftConfig:
    """The settings with the checkpoint and the base of the adapter that a run starts from.

    Raises:
        UsageError: there is no adapter, or the base is not the one that it was trained on.
    """
    hub: dict[str, Any] = {"revision": config.revision, "hub": config.hub}
    accept = config.accept_changes
    tuned = open_tuned(adapter, model=config.model, **hub, accept_changes=accept)
    if tuned.adapter is None:
        hint = f"start from it with --model {tuned.checkpoint}"
        raise ConfigError("holds a whole model", place=f"--adapter {adapter}", hint=hint)
    if config.model is None:
        hub = {"revision": tuned.settings.revision, "hub": tuned.settings.hub}
    return dataclasses.replace(config, adapter=tuned.adapter, model=tuned.base.name, **hub)


def _try_output(folder: Path) -> None:
    """Makes the folder of the runs, and a file in it; nothing is left of what was not there.

    Raises:
        ConfigError: that is not possible; better said now than after the model is loaded.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found, place = f"cannot be written ({error.strerror})", f"--output-dir {shown(folder)}"
        raise ConfigError(found, place=place, hint="name another folder") from None
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _check_tracker(name: str) -> None:
    """Raises ConfigError if the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"found {name}, which is not installed",
            place="--report-to",
            hint="pip install 'vlft[tracking]'",
        )


def _resolved(config: SftConfig, placement: Placement) -> SftConfig:
    """The settings with every ``auto`` resolved that needs no model on a GPU."""
    tokens = config.tokens_per_microbatch
    if tokens is None and placement.device.type == "cpu":
        tokens = TOKENS_PER_ROW["cpu"]
    return dataclasses.replace(
        config,
        tokens_per_microbatch=tokens,
        dtype=str(placement.dtype).removeprefix("torch."),
        learning_rate=config.learning_rate or LEARNING_RATES[config.tuner],
    )


def _absolute(config: SftConfig) -> SftConfig:
    """The settings with absolute paths, so that the run can be resumed from any folder."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute())

    model, metric = config.model, config.eval_metric
    return dataclasses.replace(
        config,
        model=absolute(model) if model is not None and Path(model).is_dir() else model,
        dataset=tuple(map(absolute, expand(config.dataset))),
        mix=resolved_mix(config.dataset, config.mix),
        val_dataset=tuple(map(absolute, expand(config.val_dataset))),
        image_root=None if config.image_root is None else config.image_root.absolute(),
        confine_images=config.confine_images and config.confine_images.absolute(),
        adapter=None if config.adapter is None else config.adapter.absolute(),
        eval_metric=absolute(metric) if metric and metric.endswith(ENDING) else metric,
    )
