"""The facts of images that were checked before, by any run, so that no image is decoded twice.

facts/images.db    SQLite: a row for each file and way of turning it

A receipt spares the checks of a whole data file. If the file has changed, or a part of it is drawn,
its images mostly are what they were. A row counts while the file's size, times and inode are the
same, for one version of vlft and of Pillow. A database that cannot be used counts as empty.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

import PIL

from vlft import __version__
from vlft.data.conversation import ImageFacts
from vlft.data.image_notes import KINDS, Note
from vlft.data.receipt import stamp_of
from vlft.errors import ConfigError
from vlft.files import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

NAME = "facts"
# Seconds to wait for another process that writes.
PATIENCE = 5.0
# Rows after which the database is made anew; a row takes about 250 bytes.
MOST_ROWS = 2_000_000

_TABLE = (
    "CREATE TABLE IF NOT EXISTS images (path TEXT, rotate INTEGER, made TEXT, stamp TEXT, "
    "digest TEXT, width INTEGER, height INTEGER, notes TEXT, PRIMARY KEY (path, rotate)) "
    "WITHOUT ROWID"
)
_FIND = (
    "SELECT digest, width, height, notes FROM images "
    "WHERE path = ? AND rotate = ? AND made = ? AND stamp = ?"
)
_ADD = "INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_FAULTS = (sqlite3.Error, OSError, ConfigError, ValueError, TypeError)


class KnownFacts:
    """Looks facts up and adds new ones, for images that are turned by EXIF or are not.

    Args:
        paths: of all images that may be asked for; their stamps are taken now, so that a file that
            changes while it is checked is checked again by the next run.
        rotate: whether images are turned by their EXIF orientation.
    """

    def __init__(self, paths: Iterable[Path], *, rotate: bool) -> None:
        self._rotate = int(rotate)
        self._stamps = {path: json.dumps(stamp_of(path)) for path in paths}

    def find(self) -> dict[Path, ImageFacts]:
        """The facts of those images that have not changed since they were checked."""
        found: dict[Path, ImageFacts] = {}
        with suppress(*_FAULTS), _opened() as database:
            for path, stamp in self._stamps.items():
                keys = (str(path.absolute()), self._rotate, _made(), stamp)
                if row := database.execute(_FIND, keys).fetchone():
                    digest, width, height, notes = row
                    kinds = tuple(Note(k, detail) for k, detail in json.loads(notes) if k in KINDS)
                    found[path] = ImageFacts(digest, (width, height), kinds)
        return found

    def add(self, checked: Mapping[Path, ImageFacts]) -> None:
        """Keeps the facts of images; a disk that takes none is no error."""
        if not checked:
            return
        rows = [
            (
                str(path.absolute()), self._rotate, _made(), self._stamps[path], facts.digest,
                *facts.size, json.dumps([[note.kind, note.detail] for note in facts.notes]),
            )
            for path, facts in checked.items()
        ]  # fmt: skip
        with suppress(*_FAULTS), _opened() as database, database:
            (count,) = database.execute("SELECT COUNT(*) FROM images").fetchone()
            if count > MOST_ROWS:
                database.execute("DELETE FROM images")
            database.executemany(_ADD, rows)


@contextmanager
def _opened() -> Iterator[sqlite3.Connection]:
    """The database; a damaged one is removed.

    Raises:
        sqlite3.Error: it cannot be used.
    """
    path = cache_folder(NAME) / "images.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the rights of the user's umask, which sqlite leaves out for the group.
    path.touch()
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as database:
            database.execute(_TABLE)
            yield database
    except sqlite3.DatabaseError as error:
        # An operational error is one of the moment: another process writes, the disk is full.
        if not isinstance(error, sqlite3.OperationalError):
            path.unlink(missing_ok=True)
        raise


def _made() -> str:
    return f"{__version__} {PIL.__version__}"
