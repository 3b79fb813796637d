"""Settings of vlft check and vlft data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.shared import (
    ReadingSettings,
    makers,
)
from vlft.settings import Rule, Settings, given

if TYPE_CHECKING:
    from collections.abc import Sequence

_data, _output = makers("Data", "Output")


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class CheckConfig(ReadingSettings):
    """Settings of ``vlft check``."""

    dataset: tuple[str, ...] = _data(
        (), "Data files. FILE#N or FILE#20% draws records.", path=True, argument=True)
    val_dataset: tuple[str, ...] = _data(
        (), "Validation data: records and images that training has too are counted. Repeatable.",
        path=True)
    model: str | None = _data(None, "Model folder or hub id: lengths are counted in its tokens.",
                              path=True, default_text="none")
    max_length: int | None = _data(
        None, "Longest sample that vlft sft would take, in tokens.", minimum=8,
        default_text="the model's")
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the data file's folder")
    confine_images: Path | None = _data(None, "The only folder that images are read from.",
                                        default_text="any")
    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))
    loss_on: str = _data("all", "Which replies of a dialogue are trained.", choices=("all", "last"))
    seed: int = _data(42, "Random seed of FILE#N.", minimum=0)

    write: Path | None = _output(
        None, "File (.jsonl) for what was read, as messages; embedded images go into a folder "
        "beside it.", default_text="none")
    overwrite: bool = _output(False, "Replace the file of --write if it is there.")
    json: bool = _output(False, "Print the report as JSON.")

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        return (
            (not self.dataset, "vlft check", "no data given", "write vlft check train.jsonl"),
            (self.write and self.write.suffix != ".jsonl", "--write",
             f"found {self.write}, a name that ends in .jsonl is allowed", ""),
            (self.write is None, given(self, "overwrite"), "--write is not given", None),
            (self.model is None, given(self, "max_length"), "--model is not given", None),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Settings of ``vlft data``."""

    src: tuple[str, ...] = _data(
        (), "COCO or RefCOCO JSON, PAGE or ALTO XML, or OmniDocBench JSON.", path=True,
        argument=True)
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the file's folder")
    prompt: str | None = _data(
        None, "Question of every record; <ref-object> stands for what is to be located.",
        default_text="as DeepSeek-OCR's authors ask")
    boxes: bool = _data(False, "Of pages: write the box of each line or part as well.")
    box_format: str | None = _data(
        None, "What the numbers of a bbox beside an expression are: two corners, or x, y, width, "
        "height.", choices=("xyxy", "xywh"), default_text="asked")
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))

    output: Path | None = _output(None, "File (.jsonl) for the records.", default_text="required")
    overwrite: bool = _output(False, "Replace the file of --output if it is there.")

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        return (
            (not self.src, "vlft data", "no file given",
             "write vlft data instances.json --output train.jsonl"),
            (self.output is None or self.output.suffix != ".jsonl", "--output",
             f"found {self.output or 'none'}, a name that ends in .jsonl is allowed", ""),
        )
