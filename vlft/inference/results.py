"""The result file of ``vlft infer``: a JSON line per record, in the order of the data, continued.

answers.jsonl            query, response, finish, label, images, image_keys, ... of each record
answers.settings.json    once for all: settings, model, adapter, data files, records left out
.answers.jsonl.waiting   answers to later records, until all earlier ones are there

Lines are data for ``vlft sft`` and ``vlft infer`` again: image paths are absolute.
"""

from __future__ import annotations

import itertools
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jsonlines

from vlft import console
from vlft.checkpoints.identity import is_other
from vlft.data.result_fields import result_lists
from vlft.errors import CheckpointError, ConfigError, shown
from vlft.files import json_text, read_own, replacing, same_file
from vlft.inference.columns import Columns, differences
from vlft.inference.formats import columns_of
from vlft.inference.waiting import Waiting
from vlft.locks import locked
from vlft.schema import OBJECT, TEXT, Schema, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vlft.data.conversation import Conversation
    from vlft.inference.replier import Reply

# The start of every result line. It tells a line that a kill cut off from a line of another file.
START = b'{"query": '
# Of the header; see ``run.py`` for what it holds.
_HEADER: Schema = {
    **dict.fromkeys(("settings", "model"), OBJECT),
    **dict.fromkeys(("files", "adapter", "columns"), table(TEXT)),
    **dict.fromkeys(("vlft", "weights"), TEXT),
}


class ResultFile:
    """A line per record of a data set, in the order of the records, whatever that of the answers.

    Args:
        path: the file; its folders are made.
        header: what the answers come from, see ``run.py``.
        conversations: the records.
        system_prompt: of records without one of their own.
        form: of the replies, see ``formats.py``.
        overwrite: whether to replace an existing file instead of continuing it.
        sides: names of the checkpoints, if several answer each record: a line of each, in order.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        conversations: Sequence[Conversation],
        system_prompt: str,
        *,
        form: str,
        overwrite: bool,
        sides: Sequence[str] = (),
    ) -> None:
        if not path.name:
            raise ConfigError("names no file", place=shown(path), hint="name another --output")
        self._form, self._sides = form, sides
        conversations = [item for item in conversations for _ in sides or ("",)]
        self.path = path
        self.header_path = path.with_name(path.name.removesuffix(".jsonl") + ".settings.json")
        self._columns = Columns(conversations, system_prompt)
        self._header = {**header, "columns": self._columns.kinds}
        self._conversations = conversations
        self._overwrite = overwrite
        self._waiting = Waiting(path)
        self.done = 0

    @property
    def total(self) -> int:
        """Number of lines of the whole file."""
        return len(self._conversations)

    @property
    def answered(self) -> int:
        """Number of records that are answered, those included whose lines wait."""
        return self.done + len(self._waiting.rows)

    def answers(self, number: int) -> bool:
        """Whether a record is answered."""
        return number < self.done or number in self._waiting.rows

    @contextmanager
    def held(self, inputs: Sequence[Path]) -> Iterator[None]:
        """Holds the file for this process while the block runs.

        Args:
            inputs: files that are read.

        Raises:
            UsageError: the file is one of them, was not written by vlft, or another process has it.
        """
        if any(same_file(self.path, path) for path in inputs):
            hint = "name another --output"
            raise ConfigError("is read as data", place=shown(self.path), hint=hint)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_name(f".{self.path.name}.lock"), self.path):
            self._check_own()
            yield

    def _check_own(self) -> None:
        """Raises CheckpointError if there is something that vlft has not written."""
        for path in (self.path, self.header_path, self._waiting.path):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                hint = "name another --output"
                raise CheckpointError("not a regular file", place=shown(path), hint=hint)
        is_ours = "vlft" in read_own(self.header_path, _HEADER)
        empty = not self.path.exists() or not self.path.stat().st_size
        replaced = self.path if self._overwrite and not empty else self.header_path
        if replaced.exists() and not is_ours:
            raise CheckpointError(
                f"vlft has not written this: {self.header_path.name} does not say so",
                place=shown(replaced),
                hint="name another --output, or remove the file yourself",
            )

    def resume(self) -> None:
        """Counts the records that the file answers, and removes a line that a kill cut off.

        Raises:
            CheckpointError: the file answers other records, or its answers come from elsewhere.
        """
        if self._overwrite:
            return
        if self.path.exists():
            self._read_lines()
        if self._waiting.path.exists():
            self._check_header()
            self._waiting.read(self.done, len(self._conversations))
            for number, row in self._waiting.rows.items():
                self._check_row(row, number, "a line that waits")
            self._append(self._waiting.take(self.done))
        if self.answered:
            count = f"{self.answered} of {len(self._conversations)}"
            console.info(f"{shown(self.path)} answers {count} records already")

    def _read_lines(self) -> None:
        size, changed = 0, list[str]()
        for number, (line, length) in enumerate(_whole_lines(self.path), start=1):
            if number == 1:
                columns = self._check_header()
                changed = differences(self._header["columns"], columns)
            if number > len(self._conversations):
                raise self._other(f"it has more lines than the data has records, {number - 1}")
            self._check_row(line, number - 1, f"line {number}", changed)
            size += length
            self.done = number
        if self.done and changed:
            raise self._other(f"the records need other columns, see {', '.join(changed)}")
        if size < self.path.stat().st_size:
            os.truncate(self.path, size)

    def _check_row(
        self, row: Mapping[str, Any], number: int, what: str, changed: Sequence[str] = ()
    ) -> None:
        """Raises CheckpointError if a line answers another record than that of this number."""
        expected = self._columns.row(self._conversations[number]) | self._side(number)
        found = {name: value for name, value in row.items() if name in expected}
        # The same record in another file, or the same image in another folder, is no change.
        other = set(differences(expected, found)) - {"images", "file", "line", *changed}
        if other or not _is_result(row):
            names = ", ".join(name for name in expected if name in other)
            raise self._other(f"{what} answers another record, see {names}")

    def put(self, numbers: Sequence[int], replies: Sequence[Reply]) -> list[str]:
        """Adds the replies to records of these numbers; with ``overwrite`` it replaces the file.

        Returns:
            The replies whose lines were appended to the file, in order. The others wait.
        """
        if not self.answered:
            self._begin()
        pairs = zip(numbers, replies, strict=True)
        rows = {n: self._row(n, reply) for n, reply in pairs if not self.answers(n)}
        self._waiting.rows.update(rows)
        ready = self._waiting.take(self.done)
        self._waiting.keep(rows)
        self._append(ready)
        return [row["response"] for row in ready]

    def _append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with jsonlines.open(self.path, "a", dumps=json_text, flush=True) as file:
            for row in rows:
                file.write(row)
                self.done += 1
        if self.done == len(self._conversations):
            self._waiting.remove()

    def _begin(self) -> None:
        # Whole or absent: half a header would stop every later command.
        with replacing(self.header_path) as part:
            part.write_text(json.dumps(self._header, indent=2) + "\n", "utf-8")
            if self._overwrite:
                # Not earlier: the disk may have no room even for the header.
                self.path.unlink(missing_ok=True)
                self._overwrite = False
            self._waiting.remove()

    def _row(self, number: int, reply: Reply) -> dict[str, Any]:
        conversation = self._conversations[number]
        row = self._columns.row(conversation)
        answer = {"response": reply.text, "finish": reply.finish}
        answer |= columns_of(reply.text, self._form, conversation)
        loss = reply.loss.as_row() if reply.loss else {}
        return {"query": row.pop("query"), **self._side(number), **answer, **loss, **row}

    def _side(self, number: int) -> dict[str, str]:
        """The column that names the checkpoint of a line, where there are several."""
        return {"checkpoint": self._sides[number % len(self._sides)]} if self._sides else {}

    def _check_header(self) -> Mapping[str, Any]:
        """The columns of the file's lines.

        Raises:
            CheckpointError: it was made with another model or other settings.
        """
        before = read_own(self.header_path, _HEADER)
        if not before:
            raise CheckpointError(
                f"line 1 is no result line that can be continued: without {self.header_path.name} "
                "nothing says which weights and images it is from; older versions wrote none",
                place=shown(self.path),
                hint="name another --output",
            )
        settings, old = self._header["settings"], before.get("settings", {})
        for name in differences(settings, old):
            raise self._other(f"made with other settings, {name} {old.get(name)}")
        model, old_model = self._header["model"], before.get("model", {})
        if is_other(old_model.get("weights", ""), model["weights"]):
            raise self._other("made with other weights of the model")
        for name in differences(model["files"], old_model.get("files", {})):
            raise self._other(f"made with another {name} of the model")
        if self._header["adapter"] != before.get("adapter"):
            raise self._other("made with another adapter")
        columns: Mapping[str, Any] = before.get("columns", {})
        return columns

    def _other(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"the result file is of another run: {found}",
            place=shown(self.path),
            hint="name another --output, or add --overwrite to start it anew",
        )


def read_results(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """The first lines of a result file, or all of them.

    Raises:
        CheckpointError: a line is no result line.
    """
    return [result_lists(line) for line, _ in itertools.islice(_whole_lines(path), count)]


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete result lines with their lengths in bytes; a line cut off by a kill is skipped.

    Raises:
        CheckpointError: a line is no result line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if line.endswith(b"\n") and _is_result(value):
                yield value, len(line)
            elif line.endswith(b"\n") or line[: len(START)] != START[: len(line)]:
                raise CheckpointError(
                    f"line {number} is no result line; the file is left as it is",
                    place=shown(path),
                    hint="name another --output",
                )


def _is_result(value: Any) -> bool:
    """Whether a JSON value has what every result line has, of the right types."""
    if not isinstance(value, dict) or not isinstance(value.get("response"), str):
        return False
    images = result_lists(value).get("images")
    return isinstance(images, list) and all(isinstance(image, str) for image in images)
