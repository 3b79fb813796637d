"""What a check of data files finds: counts, problems, and the conversations as messages."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.data.conversation import flat_text
from vlft.data.dataset import of_conversation
from vlft.data.fit import BATCH, fit
from vlft.data.layouts.place import COMMON_TAG
from vlft.data.names import DRAWN
from vlft.data.records import RecordError
from vlft.data.written import check_target
from vlft.errors import DataError, shown
from vlft.files import cache_folder, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from vlft.data.conversation import Conversation, ImageRef
    from vlft.data.encoder import Encoder
    from vlft.data.options import DataOptions
    from vlft.data.source import ReadFile
    from vlft.errors import UsageError

# Of each object that is written.
KEYS = ("messages", "images", "source")
# First bytes of image files -> ending.
ENDINGS = {
    b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp",
    b"II*\0": ".tif", b"MM\0*": ".tif",
}  # fmt: skip


def file_report(file: ReadFile) -> dict[str, Any]:
    """The counts of a file and how it was read, as JSON values."""
    items = file.items
    shown_images = np.unique(np.asarray(items.columns.images, np.int32)).tolist()
    return {
        "file": str(file.path),
        "container": file.form.kind,
        "layouts": list(file.form.layouts),
        "columns": list(file.form.columns),
        "not_read": list(file.form.unread),
        "note": file.form.note,
        "records": len(file.indices),
        "records_read": len(set(items.columns.record)),
        "samples": len(items),
        "of_weight_0": items.columns.weight.count(0.0),
        "images": len(items.columns.images),
        "distinct_images": len({items.facts(image).digest for image in shown_images}),
        "turns": dict(sorted(Counter(map(abs, items.columns.turns)).items())),
    }


def with_notes(file: ReadFile) -> list[Conversation]:
    """The first conversation of each image that has something unexpected."""
    items = file.items
    images = np.asarray(items.columns.images, np.int32)
    numbers, first = np.unique(images, return_index=True)
    noted = [place for n, place in zip(numbers, first, strict=True) if items.facts(int(n)).notes]
    owners = np.searchsorted(np.asarray(items.columns.ends), noted, side="right")
    return [items.conversation(index) for index in np.unique(owners).tolist()]


def token_lengths(file: ReadFile, encoder: Encoder) -> list[int]:
    """(S,) tokens of a file's samples, image tokens included.

    Raises:
        DataError: the model cannot take a sample.
    """
    items, made = file.items, []
    for start in range(0, len(items), BATCH):
        stop = min(start + BATCH, len(items))
        made += encoder.lengths([items.conversation(index) for index in range(start, stop)])
    return made


def too_long(
    file: ReadFile, lengths: Sequence[int], encoder: Encoder, options: DataOptions
) -> list[DataError]:
    """The problems of the samples that are longer than ``max_length`` allows."""
    found = []
    for index, length in enumerate(lengths):
        if options.max_length is not None and length > options.max_length:
            item = file.items.conversation(index)
            try:
                fit(item, encoder, options, length)
            except DataError as error:
                found.append(of_conversation(error, item))
    return found


def count_tokens(file: ReadFile, encoder: Encoder, lengths: Sequence[int]) -> dict[str, int]:
    """Sum and spread of the lengths of a file's samples; none without samples.

    ``special_as_text`` counts the special tokens in texts, which are read as plain text, if any.
    """
    if not lengths:
        return {}
    ordered = sorted(lengths)
    special = sum(len(encoder.as_text(item)) for _, item in file.items)
    return {
        "total": sum(lengths), "shortest": ordered[0], "median": ordered[len(ordered) // 2],
        "longest": ordered[-1], **({"special_as_text": special} if special else {}),
    }  # fmt: skip


def problem_report(problem: UsageError) -> dict[str, Any]:
    """A problem as JSON values."""
    report: dict[str, Any] = {name: getattr(problem, name) for name in ("place", "message", "hint")}
    if isinstance(problem, RecordError):
        record = problem.record
        report |= {"file": str(record.path), "line": record.line, "record": record.number}
    return report


def write_messages(
    path: Path, items: Iterable[Conversation], inputs: Iterable[Path], *, overwrite: bool
) -> None:
    """Writes conversations as one object of messages per line.

    Args:
        path: of the new file; images that data files hold themselves are written into the folder
            ``NAME_images`` beside it.
        items: conversations.
        inputs: files that are read.
        overwrite: whether an earlier file of this kind may be replaced.

    Raises:
        ConfigError: the file may not be written.
    """
    check_target(path, inputs, KEYS, overwrite=overwrite, flag="--write")
    folder = path.with_name(f"{path.stem}_images")
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(_dumps(_as_messages(item, folder)) + "\n")


def _dumps(row: dict[str, Any]) -> str:
    """The row as JSON on one line, also for readers that know more line ends than newlines."""
    text = json.dumps(row, ensure_ascii=False)
    for mark in "\x85\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _as_messages(item: Conversation, folder: Path) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if item.system is not None:
        messages.append({"role": "system", "content": item.system, "loss": False})
    messages += (
        {
            "role": turn.role,
            "content": flat_text(turn, COMMON_TAG),
            "loss": turn.role == "assistant" and turn.is_trained,
        }
        for turn in (item.without_reply() if item.drawn else item).turns
    )
    origin = item.origin
    images = [os.path.abspath(_own_path(image, folder)) for image in item.images]  # noqa: PTH100
    drawn = {DRAWN: [images.pop()]} if item.drawn else {}
    return {
        "messages": messages,
        "images": images,
        **drawn,
        "source": f"{origin.path}:{origin.number}" if origin else "",
    }


def _own_path(image: ImageRef, folder: Path) -> Path:
    """The file of an image; one that a data file holds is copied into the folder."""
    if not image.path.is_relative_to(cache_folder("images")):
        return image.path
    folder.mkdir(exist_ok=True)
    with image.path.open("rb") as file:
        head = file.read(4)
    ending = next((end for mark, end in ENDINGS.items() if head.startswith(mark)), "")
    copy = folder / f"{image.path.name}{ending}"
    if not copy.exists():
        shutil.copyfile(image.path, copy)
    return copy


def lines_of(report: dict[str, Any]) -> Iterable[str]:
    """The report of a file for people."""
    counts = {name: report[name] for name in ("records", "samples", "images")}
    named = [f"{n} {name if n != 1 else name[:-1]}" for name, n in counts.items()]
    named[0] += f", {report['records_read']} read"
    named[1] += f", {report['of_weight_0']} of weight 0" if report["of_weight_0"] else ""
    named[2] += f", {report['distinct_images']} distinct"
    yield f"{shown(report['file'])}: {'; '.join(named)}"
    if report.get("tokens"):
        found = (f"{name.replace('_', ' ')} {count:,}" for name, count in report["tokens"].items())
        yield f"{shown(report['file'])}: tokens: {', '.join(found)}"
