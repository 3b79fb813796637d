"""``vlft check``: what ``vlft sft`` would read of data files, and every problem."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from vlft.checkpoints.locate import locate_model
from vlft.console import info, out
from vlft.data.check import count_tokens, file_report, lines_of, problem_report, write_messages
from vlft.data.image_notes import list_notes, warn_of_images
from vlft.data.options import DataOptions, reading_of
from vlft.data.source import describe, idle_flags, problems_of
from vlft.data.specs import expand, read_files
from vlft.data.split import Draws
from vlft.errors import UsageError, raise_all, shown
from vlft.settings import check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.config import CheckConfig
    from vlft.data.source import ReadFile
    from vlft.families.processor import Processor


def run_check(config: CheckConfig) -> None:
    """Reports what the data files hold, and writes what was read if that is asked for.

    Raises:
        UsageError: every problem, unless bad records are to be skipped.
        typer.Exit: with code 2 in place of it, if the report is JSON.
    """
    config = check(config)
    processor = None
    if config.model is not None:
        processor = locate_model(config.model, weights=False).processor()
    options = _options(config, processor)
    specs = expand([*config.dataset, *config.val_dataset])
    read = read_files(specs, Draws(options.seed), options, {})
    strict = config.on_bad_sample == "error"
    unusable = [file for file in read if isinstance(file, UsageError)]
    files = [file for file in read if not isinstance(file, UsageError)]
    problems = [problem for file in read for problem in problems_of(file, strict=strict)]
    items = [item for file in files for _, item in file.items]
    if config.write is not None and items:
        write_messages(config.write, items, overwrite=config.overwrite)
        samples = "1 sample" if len(items) == 1 else f"{len(items)} samples"
        info(f"{samples} written to {shown(config.write)}")
    if items:
        idle = idle_flags({flag for file in files for flag in file.flags}, options.reading)
        problems, unusable = [*problems, *idle], [*unusable, *idle]
    refused = problems if strict else unusable
    if not items and not refused:
        refused = problems
    reports = [file_report(file) for file in files]
    if processor is not None:
        for file, report in zip(files, reports, strict=True):
            report["tokens"] = count_tokens(file, processor.encoder)
    _show(files, reports, problems, is_usable=not refused, as_json=config.json)
    if not config.json:
        raise_all(refused)
    if refused:
        raise typer.Exit(2)


def _options(config: CheckConfig, processor: Processor | None) -> DataOptions:
    """How data files are read: for a model, or as for a family without tags for boxes."""
    return DataOptions(
        reading=processor.reading(config) if processor else reading_of(config, "<image>"),
        rotate=processor is not None and processor.pixels.rotate,
        image_root=config.image_root,
        confine_images=config.confine_images,
        allow_private_urls=config.allow_private_urls,
        on_bad_sample=config.on_bad_sample,
        seed=config.seed,
    )


def _show(
    files: Sequence[ReadFile],
    reports: Sequence[dict[str, Any]],
    problems: Sequence[UsageError],
    *,
    is_usable: bool,
    as_json: bool,
) -> None:
    """Prints the reports: as one JSON object with the problems, or lines without them."""
    items = [item for file in files for _, item in file.items]
    if as_json:
        found = [problem_report(problem) for problem in problems]
        report = {"files": reports, "problems": found, "usable": is_usable}
        report["image_notes"] = list_notes(items)
        out.print(json.dumps(report, indent=1, ensure_ascii=False), markup=False)
        return
    for file, report in zip(files, reports, strict=True):
        describe(file)
        for line in lines_of(report):
            out.print(line, markup=False)
    warn_of_images(items)
