"""Settings of the commands merge-lora, convert, models, cache, demo, env and report."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.shared import (
    DEVICES,
    DTYPES,
    HUBS,
    hub_rules,
    makers,
)
from vlft.settings import Rule, Settings, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

_model, _output = makers("Model", "Output")


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class MergeLoraConfig(Settings):
    """Settings of ``vlft merge-lora``."""

    ckpt_dir: Path | None = _model(
        None, "Run folder of vlft sft, or a checkpoint-N in it.", default_text="required")
    model: str | None = _model(None, "Base model.", path=True, default_text="the run's")
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)
    base: str = _model(
        "dequantized", "Weights to add a QLoRA adapter to: the dequantized ones of its training, "
        "or the original.", choices=("dequantized", "original"))
    device: str = _model("cpu", "Device to merge on, in float32.", choices=DEVICES)
    accept_changes: bool = _model(False, "Merge although the model has other weights than the "
                                  "adapter's base.")

    output_dir: Path | None = _output(
        None, "New folder for the merged model.", default_text="CKPT_DIR-merged")
    format: str = _output("auto", "Layout of the files. original: the authors'. auto: the base's.",
                          choices=("auto", "original", "transformers"))
    dtype: str = _output(
        "auto", "Data type of the files. auto: that of the base's files.", choices=DTYPES)
    max_shard_size: str = _output("5GB", "Largest size of a weight file.")
    overwrite: bool = _output(False, "Replace the output folder if it is not empty.")

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        return (
            (self.ckpt_dir is None, "--ckpt-dir", "no adapter given",
             "name a run or a checkpoint-N folder of vlft sft"),
            *hub_rules(self, self.model),
            _shard_size(self.max_shard_size),
        )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Settings of ``vlft convert``."""

    src: str | None = _model(None, "Model folder or hub id.", path=True, argument=True)
    dst: Path | None = _model(None, "New folder for the model.", argument=True)
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)

    model_roles: str = _model(
        "auto", "Names of user and assistant in Janus' chat text. words: User, Assistant, as "
        "Janus-1.3B; tokens: <|User|>, <|Assistant|>, as Janus-Pro; auto: what the files say.",
        choices=("auto", "words", "tokens"))

    format: str = _output("original", "Layout of the files. original: the authors'.",
                          choices=("original", "transformers"))
    dtype: str = _output(
        "auto", "Data type of the files. auto: that of each tensor.", choices=DTYPES)
    max_shard_size: str = _output("5GB", "Largest size of a weight file.")
    overwrite: bool = _output(False, "Replace the output folder if it is not empty.")

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        return (
            (self.src is None or self.dst is None, "vlft convert", "two folders are needed",
             "write vlft convert SRC DST --format transformers"),
            *hub_rules(self, self.src),
            _shard_size(self.max_shard_size),
        )


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Settings):
    """``vlft models`` has no settings."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Settings of ``vlft cache``."""

    action: str = setting("info", "info lists what is kept, clear removes all of it.",
                          panel="Action", argument=True, choices=("info", "clear"))


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Settings of ``vlft demo``."""

    output_dir: Path = _output(Path("output/demo"), "Folder of its results.")
    quick: bool = _output(False, "An epoch of 200 records, to see that it works.")


@dataclass(frozen=True, kw_only=True)
class EnvConfig(Settings):
    """Settings of ``vlft env``."""

    json: bool = _output(False, "Print it as JSON.")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Settings of ``vlft report``."""

    runs: tuple[Path, ...] = _model((), "Run folders of vlft sft.", argument=True)
    output: Path | None = _output(
        None, "File (.html).", default_text="report.html in the run, of several here")

    def rules(self) -> Sequence[Rule]:
        """It reports on something."""
        return ((not self.runs, "vlft report", "found no run folder",
                 "write e.g. vlft report output/MODEL/v0-..."),)
# fmt: on


def _shard_size(size: str) -> Rule:
    """The rule of a size: refused with another unit, or where it is no size of a file."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", size.strip(), re.IGNORECASE)
    kilobytes = float(found[1]) * 1000 ** "KMGT".index(found[2].upper()) if found else 0
    hint = "write e.g. 5GB or 500MB; the units are KB, MB, GB and TB"
    wrong = not 1 <= kilobytes <= 1e12
    return wrong, "--max-shard-size", f"found {size!r}, 1KB to 1000TB is allowed", hint
