"""``--save-text``: writes a document's text file once all of its pages have replies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.outputs import read_mark, write_mark
from vlft.console import info, warn
from vlft.data.ocr_blocks import split_pages
from vlft.errors import ConfigError, raise_all, shown
from vlft.files import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.conversation import Conversation
    from vlft.data.documents import Document

BETWEEN = "\n\n<!-- page {} -->\n\n"


class SavedText:
    """The text files of documents, each whole or absent.

    Args:
        folder: for the files.
        documents: all of them.
        conversations: a page each, in the order of the replies; a skipped page has none.
    """

    def __init__(
        self, folder: Path, documents: Sequence[Document], conversations: Sequence[Conversation]
    ) -> None:
        self._folder = folder
        self._missing = {str(document.path): len(document.pages) for document in documents}
        self._files = file_names([document.path for document in documents])
        self._pages: list[Any] = [item.origin.meta for item in conversations if item.origin]
        self._texts: dict[str, dict[int, str]] = {}
        self._done = 0
        self._written = 0

    def begin(self, replies: Sequence[str], *, overwrite: bool) -> None:
        """Checks what is in the folder, and writes the documents that are answered already.

        Raises:
            ConfigError: a file is there that vlft has not written, or with another text and
            ``overwrite`` is not set.
        """
        texts = self._take(replies)
        ours = read_mark(self._folder)
        problems = []
        for name, file in self._files.items():
            path = self._folder / file
            if not os.path.lexists(path):
                continue
            is_file = path.is_file() and not path.is_symlink()
            is_same = is_file and name in texts and path.read_bytes() == _bytes(texts[name])
            if is_same or (is_file and overwrite and file in ours):
                continue
            found = "is there already"
            hint = "name another --save-text, or add --overwrite to replace it"
            if file not in ours:
                found = "is there, and vlft has not written it"
                hint = "name another --save-text, or remove it yourself"
            problems.append(ConfigError(found, place=shown(path), hint=hint))
        raise_all(problems)
        # Before the files: one that a kill leaves is listed.
        self._folder.mkdir(parents=True, exist_ok=True)
        write_mark(self._folder, ours | set(self._files.values()))
        self._write(texts)

    def add(self, replies: Sequence[str]) -> None:
        """Takes the next replies and writes the documents that they complete."""
        self._write(self._take(replies))

    def finish(self) -> None:
        """Says what was written."""
        info(f"{self._written} documents in {shown(self._folder)}")
        missing = len(self._files) - self._written
        if missing:
            warn(f"{missing} documents have no text: a page of each could not be read")

    def _take(self, replies: Sequence[str]) -> dict[str, str]:
        """The texts of the documents that these replies complete."""
        complete = {}
        for reply in replies:
            meta = self._pages[self._done]
            name, first = meta["document"], meta["page"]
            count = meta.get("last_page", first) - first + 1
            self._done += 1
            self._missing[name] -= count
            texts = self._texts.setdefault(name, {})
            texts |= {first + number: text for number, text in enumerate(by_page(reply, count))}
            if not self._missing[name]:
                complete[name] = joined(self._texts.pop(name))
        return complete

    def _write(self, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            path = self._folder / self._files[name]
            # The result file's lock keeps others away.
            with replacing(path) as part:
                part.write_bytes(_bytes(text))
            self._written += 1


def file_names(paths: Sequence[Path]) -> dict[str, str]:
    """The text file of each document, relative to the folder: its name with .md as the ending.

    Below the folder that all share; the old ending stays where two names would be equal.
    """
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    plain = {str(path): path.absolute().relative_to(folder) for path in paths}
    ends = [str(path.with_suffix(".md")).casefold() for path in plain.values()]
    return {
        name: f"{path}.md" if ends.count(ends[number]) > 1 else str(path.with_suffix(".md"))
        for number, (name, path) in enumerate(plain.items())
    }


def by_page(reply: str, count: int) -> list[str]:
    """The text of each of the pages that a reply is about; all in one if it does not tell."""
    pages = split_pages(reply)
    return [page.strip() for page in pages] if 1 < count == len(pages) else [reply]


def joined(texts: Mapping[int, str]) -> str:
    """The text of a document; a comment that markdown does not show stands between its pages.

    ``texts`` are by the number of the page, from 1, in order.
    """
    first, *rest = texts
    return texts[first] + "".join(BETWEEN.format(page) + texts[page] for page in rest) + "\n"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
