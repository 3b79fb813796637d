"""The result file of ``vlft infer``: a JSON line per record, appended batch by batch, continued."""

from __future__ import annotations

import functools
import json
import os
from typing import TYPE_CHECKING, Any

import jsonlines

from vlft.data.conversation import Conversation, flat_text
from vlft.data.layouts import COMMON_TAG
from vlft.errors import CheckpointError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


# The start of every result line. It tells a line that a kill cut off from a line of another file.
START = b'{"query": '


class ResultFile:
    """A line per record of a data set, in the order of the records.

    Args:
        path: the file; its folders are made.
        settings: generation settings, recorded in each line.
        overwrite: whether to replace an existing file instead of continuing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self.path = path
        self._settings = dict(settings)
        self._overwrite = overwrite

    def done(self, conversations: Sequence[Conversation]) -> int:
        """Number of records that the file answers; a line that a kill cut off is removed from it.

        Raises:
            CheckpointError: the file answers other records, or was made with other settings.
        """
        if self._overwrite or not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return 0
        lines = _whole_lines(self.path)
        if len(lines) > len(conversations):
            raise self._other(f"{len(lines)} lines for {len(conversations)} records")
        pairs = zip(lines, conversations, strict=False)
        for number, (line, conversation) in enumerate(pairs, start=1):
            expected = _describe_record(conversation)
            if any(line.get(key) != value for key, value in expected.items()):
                raise self._other(f"line {number} answers another record")
            if line.get("generation") != self._settings:
                raise self._other(f"line {number} was made with other settings")
        return len(lines)

    def append(self, conversations: Sequence[Conversation], replies: Sequence[str]) -> None:
        """Appends and flushes the lines of a batch; with ``overwrite`` the first call replaces."""
        if self._overwrite:
            self.path.unlink(missing_ok=True)
            self._overwrite = False
        dumps = functools.partial(json.dumps, ensure_ascii=False)
        with jsonlines.open(self.path, "a", dumps=dumps, flush=True) as file:
            for conversation, reply in zip(conversations, replies, strict=True):
                row = _describe_record(conversation)
                row |= {"response": reply, "generation": self._settings}
                file.write(row)

    def rows(self) -> list[dict[str, Any]]:
        """All lines of the file."""
        return _whole_lines(self.path)

    def _other(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"the result file is of another run: {found}",
            place=str(self.path),
            hint="name another --output, or add --overwrite to start it anew",
        )


def _describe_record(conversation: Conversation) -> dict[str, Any]:
    """The record in its result line: query, label, images; history and system if there are any."""
    prompt = conversation.without_reply()
    texts = [flat_text(turn, COMMON_TAG) for turn in prompt.turns]
    row: dict[str, Any] = {
        "query": texts[-1],
        "label": conversation.reply,
        "images": [image.given for image in prompt.images],
    }
    if len(texts) > 1:
        row["history"] = [[texts[i], texts[i + 1]] for i in range(0, len(texts) - 1, 2)]
    if conversation.system is not None:
        row["system"] = conversation.system
    return row


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The result lines of the file; a last line that a kill cut off is removed from it.

    Raises:
        CheckpointError: a line is no result line; the file is not changed.
    """
    whole: list[dict[str, Any]] = []
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, dict) and line.endswith(b"\n"):
                whole.append(value)
                size += len(line)
            elif line.endswith(b"\n") or line[: len(START)] != START[: len(line)]:
                raise CheckpointError(
                    f"line {number} is no result line; the file is left as it is",
                    place=shown(path),
                    hint="name another --output",
                )
    if size < path.stat().st_size:
        os.truncate(path, size)
    return whole
