"""``vlft check``: what ``vlft sft`` would read of data files, and every problem."""

from __future__ import annotations

import json
from itertools import chain
from typing import TYPE_CHECKING, Any

import typer

from vlft.checkpoints.locate import locate_model
from vlft.console import info, out
from vlft.data.check import (
    count_tokens,
    file_report,
    lines_of,
    problem_report,
    token_lengths,
    too_long,
    with_notes,
    write_messages,
)
from vlft.data.histograms import (
    histograms,
    lines_of_histograms,
    lines_of_replies,
    replies,
)
from vlft.data.image_notes import list_notes, warn_of_images
from vlft.data.options import DataOptions, reading_of
from vlft.data.repeats import contents_of, leaks, lines_of_duplicates, lines_of_leaks
from vlft.data.source import describe, idle_flags, problems_of
from vlft.data.specs import expand, read_files
from vlft.data.split import Draws, nothing_has_weight
from vlft.errors import UsageError, printable, raise_all, shown
from vlft.settings import check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.config import CheckConfig
    from vlft.data.conversation import Conversation
    from vlft.data.source import ReadFile
    from vlft.errors import DataError
    from vlft.families.processor import Processor


def run_check(config: CheckConfig) -> None:
    """Reports what the data files hold, and writes what was read if that is asked for.

    Raises:
        UsageError: every problem, unless bad records are to be skipped.
        typer.Exit: with code 2 in place of it, if the report is JSON.
    """
    config = check(config)
    model = None if config.model is None else locate_model(config.model, weights=False)
    processor = model.processor() if model else None
    options = _options(config, processor)
    specs = expand(config.dataset)
    count = len(specs)
    read = read_files([*specs, *expand(config.val_dataset)], Draws(options.seed), options, {})
    strict = config.on_bad_sample == "error"
    unusable = [file for file in read if isinstance(file, UsageError)]
    files = _readable(read)
    problems = [problem for file in read for problem in problems_of(file, strict=strict)]
    tokens, long = _lengths(files, processor, options)
    problems += long
    total = sum(len(file.items) for file in files)
    if config.write is not None and total:
        items = (item for file in files for _, item in file.items)
        inputs = [file.path for file in files]
        write_messages(config.write, items, inputs, overwrite=config.overwrite)
        samples = "1 sample" if total == 1 else f"{total} samples"
        info(f"{samples} written to {shown(config.write)}")
    if total:
        idle = idle_flags({flag for file in files for flag in file.flags}, options.reading)
        idle += _without_weight(read[:count])
        problems, unusable = [*problems, *idle], [*unusable, *idle]
    refused = problems if strict else unusable
    if total == len(long) and not refused:
        refused = problems
    report = _report(read[:count], read[count:], tokens, processor)
    if config.json:
        report["problems"] = [problem_report(problem) for problem in problems]
        report |= {"usable": not refused, "image_notes": list_notes(_noted(files))}
        out.print(json.dumps(report, indent=1, ensure_ascii=False), markup=False)
    else:
        _show(files, report)
        raise_all(refused)
    if refused:
        raise typer.Exit(2)


def _options(config: CheckConfig, processor: Processor | None) -> DataOptions:
    """The reading options of a model; without one, those of a family that has no box tags.

    Boxes are then refused, because nothing says whether the user's model can learn them.
    """
    longest = processor.max_length if processor else None
    return DataOptions(
        reading=processor.reading(config) if processor else reading_of(config, "<image>"),
        rotate=processor is not None and processor.pixels.rotate,
        image_root=config.image_root,
        confine_images=config.confine_images,
        allow_private_urls=config.allow_private_urls,
        on_bad_sample=config.on_bad_sample,
        max_length=None if longest is None else min(config.max_length or longest, longest),
        model_length=longest,
        seed=config.seed,
        is_check=True,
    )


def _lengths(
    files: Sequence[ReadFile], processor: Processor | None, options: DataOptions
) -> tuple[list[list[int]], list[DataError]]:
    """The lengths of each file's samples in tokens, and the problems of those that are too long."""
    if processor is None:
        return [], []
    encoder = processor.encoder
    tokens = [token_lengths(file, encoder) for file in files]
    pairs = zip(files, tokens, strict=True)
    return tokens, [
        error for file, found in pairs for error in too_long(file, found, encoder, options)
    ]


def _report(
    train: Sequence[ReadFile | UsageError],
    validation: Sequence[ReadFile | UsageError],
    tokens: Sequence[Sequence[int]],
    processor: Processor | None,
) -> dict[str, Any]:
    """The report on the data as JSON values, without the problems."""
    sets = {"dataset": _readable(train), "val_dataset": _readable(validation)}
    files = [*sets["dataset"], *sets["val_dataset"]]
    reports = [file_report(file) for file in files]
    if processor is not None:
        for file, part, lengths in zip(files, reports, tokens, strict=True):
            part["tokens"] = count_tokens(file, processor.encoder, lengths)
    contents = {name: contents_of(group) for name, group in sets.items()}
    report: dict[str, Any] = {
        "files": reports,
        "histograms": histograms(files, [*chain.from_iterable(tokens)]),
        "replies": replies(files),
        "duplicates": {name: part.duplicates() for name, part in contents.items() if sets[name]},
    }
    if sets["val_dataset"]:
        report["leakage"] = leaks(contents["dataset"], sets["val_dataset"])
    return report


def _readable(read: Sequence[ReadFile | UsageError]) -> list[ReadFile]:
    return [file for file in read if not isinstance(file, UsageError)]


def _without_weight(train: Sequence[ReadFile | UsageError]) -> list[UsageError]:
    """The error of training data whose samples all have weight 0."""
    columns = [file.items.columns for file in _readable(train)]
    total = sum(len(part.weight) for part in columns)
    if not total or any(weight > 0 for part in columns for weight in part.weight):
        return []
    return [nothing_has_weight(total)]


def _noted(files: Sequence[ReadFile]) -> list[Conversation]:
    return [item for file in files for item in with_notes(file)]


def _show(files: Sequence[ReadFile], report: dict[str, Any]) -> None:
    """Prints the report, except the problems, as lines."""
    for file, part in zip(files, report["files"], strict=True):
        describe(file)
        for line in lines_of(part):
            out.print(line, markup=False)
    for line in lines_of_histograms(report["histograms"]):
        out.print(line, markup=False)
    lines = [*lines_of_replies(report["replies"])]
    lines += [line for part in report["duplicates"].values() for line in lines_of_duplicates(part)]
    for line in [*lines, *lines_of_leaks(report.get("leakage", {}))]:
        out.print(printable(line), markup=False)
    warn_of_images(_noted(files))
