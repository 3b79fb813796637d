"""A part of a UTF-8 file that slides over it, so that records are found without the whole text."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any

from vlft.data.records import BOM
from vlft.errors import DataError

if TYPE_CHECKING:
    from typing import BinaryIO

# Bytes that are read at once.
CHUNK = 2**20
BLANK = re.compile(f"[ \\t\\r\\n{BOM}]*")
# Characters that are searched backwards for the start of a line, to name the column of an error.
LONGEST_LINE = 2**24
# Near the end of what is read, an error may be due to what follows: "\ud8" of a longer escape.
LONGEST_ESCAPE = 12


class NotTextError(DataError):
    """The offset of a byte that is not valid UTF-8."""

    def __init__(self, byte: int) -> None:
        super().__init__(f"not UTF-8 (byte {byte})", hint="save the file as UTF-8")


class Window:
    """The text of a file from some place on, as far as it was read.

    Args:
        file: UTF-8 text, read from its current position on.

    Attributes:
        text: a part of the file; what lies before the line of the position may be dropped.
        position: index into the text.
        ended: whether the text goes to the end of the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.text = ""
        self.position = 0
        self.ended = False
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        # Line and byte offset of an index into the text up to which they were counted.
        self._counted, self._line, self._offset = 0, 1, file.tell()

    def more(self) -> bool:
        """Reads more of the file; False at its end.

        Raises:
            NotTextError: it is no UTF-8.
        """
        if self.ended:
            return False
        # A text that grows is read in ever larger parts, or a long value would take quadratic time.
        at, chunk = self._file.tell(), self._file.read(max(CHUNK, len(self.text)))
        waiting = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise NotTextError(error.start + at - waiting) from None
        self.ended = not chunk
        return not self.ended

    def skip_blank(self) -> bool:
        """Moves to the next character that is no white space; False if there is none."""
        self._drop()
        while True:
            self.position = skip_blank(self.text, self.position)
            if self.position < len(self.text):
                return True
            if not self.more():
                return False

    def decode(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The JSON value at the position, and the index of its end in the text.

        Raises:
            ValueError, RecursionError: there is none.
        """
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or (
                    error.pos > len(self.text) - LONGEST_ESCAPE
                )
                if is_cut and self.more():
                    continue
                raise
            # A number at the end of the window may continue in the next part of the file.
            if end < len(self.text) or isinstance(value, dict | list) or not self.more():
                return value, end

    def read_line(self) -> None:
        """Reads on until the line of the position, and the text that follows it, are there."""
        while self.text.find("\n", self.position) < 0 and self.more():
            pass
        while skip_blank(self.text, self.line_end) == len(self.text) and self.more():
            pass

    def find(self, mark: str, start: int) -> int:
        """The index of a text from an index on, -1 if there is none in the rest of the file."""
        while (found := self.text.find(mark, start)) < 0 and self.more():
            pass
        return found

    @property
    def line_end(self) -> int:
        """The index of the end of the line that holds the position."""
        end = self.text.find("\n", self.position)
        return len(self.text) if end < 0 else end

    @property
    def line(self) -> int:
        """The number of the line of the position, from 1."""
        self._count()
        return self._line

    @property
    def offset(self) -> int:
        """The byte of the file at the position."""
        self._count()
        return self._offset

    def line_of(self, index: int) -> int:
        """The number of the line of an index."""
        text, position = self.text, self.position
        # An error at the end of a file is reported for its last line with text.
        index = min(index, len(text.rstrip()) if self.ended else len(text))
        before = text.count("\n", index, position)
        return self.line + text.count("\n", position, index) - before

    def _count(self) -> None:
        if self._counted != self.position:
            passed = self.text[self._counted : self.position]
            self._line += passed.count("\n")
            self._offset += len(passed) if passed.isascii() else len(passed.encode())
            self._counted = self.position

    def _drop(self) -> None:
        """Forgets what lies before the line of the position, once that is much."""
        if self.position > CHUNK:
            self._count()
            start = self.text.rfind("\n", 0, self.position) + 1
            if not start and self.position > LONGEST_LINE:
                start = self.position
            self.text = self.text[start:]
            self.position -= start
            self._counted -= start


def skip_blank(text: str, position: int) -> int:
    """The index of the next character that is no white space."""
    found = BLANK.match(text, position)
    return found.end() if found else position
