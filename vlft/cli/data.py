"""``vlft data``: converts annotation files, such as COCO or PAGE XML, into vlft's records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlft.console import info, warn
from vlft.data.convert import READ, convert_files
from vlft.data.convert.samples import Options
from vlft.data.written import check_target
from vlft.errors import ConfigError, DataError, UsageError, raise_all, shown
from vlft.files import json_text, replacing
from vlft.settings import check, flag

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vlft.config import DataConfig


# Of each record, besides objects.
KEYS = ("id", "messages", "images")


def run_data(config: DataConfig) -> None:
    """Converts files, and writes the records as one object per line.

    Raises:
        UsageError: every problem, unless bad records are to be skipped, or that nothing is left.
    """
    config = check(config)
    output = Path(config.output or "")
    inputs = [Path(name) for name in config.src]
    check_target(output, inputs, KEYS, overwrite=config.overwrite, flag="--output")
    options = Options(config.image_root, config.prompt, config.boxes, config.box_format)
    found = convert_files([Path(name) for name in config.src], options)
    idle: list[UsageError] = [
        ConfigError("decides nothing in these files", place=flag(name), hint="leave it out")
        for name in ("boxes", "box_format")
        if getattr(config, name) and found.rows and name not in found.flags
    ]
    raise_all(idle if config.on_bad_sample == "skip" else [*found.problems, *idle])
    if found.problems:
        warn(f"skipped {len(found.problems)}, the first: {found.problems[0]}")
    if not found.rows:
        raise DataError("no record is left", place=shown(config.src[0]), hint=READ)
    for what, count in found.left_out.items():
        if count:
            info(f"left out: {count} {what}")
    _write(output, found.rows)
    records = "1 record" if len(found.rows) == 1 else f"{len(found.rows)} records"
    info(f"{records} written to {shown(output)}; vlft check reads them")


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(f"{json_text(row)}\n" for row in rows)
