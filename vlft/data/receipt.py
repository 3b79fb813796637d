"""What the checks of a data file found, kept so that the next run on the same file need not check.

receipts/<SHA-256>.npz    arrays of the conversations, and one of JSON: images, layouts, columns

The name is a hash of the file's bytes and of all settings that its reading depends on. An image is
checked again if its file is not what it was by size, times and inode. A receipt is written if a
whole file has no problem; a damaged one counts as none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft import __version__
from vlft.data.containers.indexed import Indexed
from vlft.data.conversation import ImageFacts, ImageRef
from vlft.data.image_notes import KINDS, Note
from vlft.data.weights import LARGEST
from vlft.errors import CheckpointError
from vlft.files import cache_folder, digest
from vlft.schema import TEXT, Rule, Schema, check_fields, many, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.data.encoder import Encoder
    from vlft.data.fit import Fitted
    from vlft.data.items import Items
    from vlft.data.options import DataOptions
    from vlft.data.source import ReadFile

NAME = "receipts"
# The checks of a smaller file take no longer than a receipt.
FEWEST_BYTES = 200_000
# Older ones are removed; a million records take about 40 MB.
MOST_RECEIPTS = 16
COLUMNS = ("record", "part", "size", "turns", "text", "weight", "ends", "draws", "images")
_TEXTS = many(TEXT, 0, 10_000)


def _is_image(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 7:
        return False
    path, given, address, content, size, notes, stamp = value
    return (
        all(isinstance(text, str) for text in (path, given, content))
        and isinstance(address, str | None)
        and many(whole(1, 10**9), 2, 2).allows(size)
        and isinstance(notes, list)
        and all(isinstance(n, list) and len(n) == 2 and n[0] in KINDS for n in notes)
        and many(whole(0, 2**63), 4, 4).allows(stamp)
    )


_SCHEMA: Schema = {
    **dict.fromkeys(("kind", "note"), TEXT),
    **dict.fromkeys(("layouts", "columns", "unread", "flags"), _TEXTS),
    "images": many(Rule("an image", _is_image), 0, 2**31),
    "special": many(whole(0, 2**31), 0, 2**31),
    "with_boxes": many(whole(0, 2**31), 0, 2**31),
}


@dataclass(frozen=True)
class Receipt:
    """What a receipt holds.

    Attributes:
        meta: see _SCHEMA.
        arrays: columns of the conversations, their ``tokens``, and ``offsets`` and ``lines`` of the
            records if they are JSON.
    """

    meta: Mapping[str, Any]
    arrays: Mapping[str, Any]

    def known_images(self) -> dict[Path, ImageFacts]:
        """The facts of the images whose files have not changed."""
        known = {}
        for path, _, _, content, size, notes, stamp in self.meta["images"]:
            if stamp_of(Path(path)) == stamp:
                kinds = tuple(Note(kind, detail) for kind, detail in notes)
                known[Path(path)] = ImageFacts(content, tuple(size), kinds)
        return known

    def refs(self) -> dict[Path, ImageRef]:
        """The images by path, as the file names them first."""
        return {
            Path(path): ImageRef(Path(path), given, address=address)
            for path, given, address, *_ in self.meta["images"]
        }


def receipt_path(path: Path, options: DataOptions, encoder: Encoder) -> Path | None:
    """Where the receipt of a data file is, or would be; None if it cannot have one."""
    stamp = stamp_of(path)
    if stamp is None or not path.is_file() or stamp[0] < FEWEST_BYTES:
        return None
    flags = (options.rotate, options.allow_private_urls, options.max_length, options.on_long)
    folders = (path.absolute(), Path.cwd(), options.image_root, options.confine_images)
    reading = (repr(options.reading), encoder.fingerprint)
    settings = (__version__, _content(path, *stamp), *map(str, folders), *flags, *reading)
    name = hashlib.sha256(repr(settings).encode("utf-8", "surrogatepass")).hexdigest()
    return cache_folder(NAME) / f"{name}.npz"


@functools.lru_cache(maxsize=64)
def _content(path: Path, *_stamp: int) -> str:
    """SHA-256 of a file, computed anew if its stamp is another one."""
    return digest(path)


def read_receipt(path: Path | None) -> Receipt | None:
    """A receipt; None if there is none, or it is damaged."""
    if path is None:
        return None
    try:
        # numpy leaves a file that it has opened itself open if it is damaged.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        check_fields(meta, _SCHEMA, "")
        if _SCHEMA.keys() - meta.keys() or not _is_whole(meta, arrays):
            return None
        os.utime(path)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    except (zipfile.BadZipFile, CheckpointError):
        return None
    return Receipt(meta, arrays)


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Writes a receipt, and removes old ones; a disk that takes none is no error."""
    part = path.with_suffix(f".{os.getpid()}.part")
    meta = np.frombuffer(json.dumps(dict(receipt.meta)).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, meta=meta, **receipt.arrays)
        part.replace(path)
        old = sorted(path.parent.glob("*.npz"), key=lambda item: item.stat().st_mtime)
        for item in old[:-MOST_RECEIPTS]:
            item.unlink(missing_ok=True)
    except OSError:
        part.unlink(missing_ok=True)


def keep_receipt(file: ReadFile, fitted: Fitted, options: DataOptions, encoder: Encoder) -> None:
    """Writes the receipt of a file that was read as a whole, if nothing is wrong with it."""
    path, whole_file = receipt_path(file.path, options, encoder), isinstance(file.indices, range)
    if path is None or path.exists() or file.problems or not (whole_file and fitted.is_all):
        return
    images = _images(file.items, file.images)
    if images is None:
        return
    form, records = file.form, file.items.records
    meta = {
        "kind": form.kind, "note": form.note, "layouts": form.layouts, "columns": form.columns,
        "unread": form.unread, "flags": sorted(file.flags), "images": images,
        "special": sorted(file.items.special), "with_boxes": file.items.with_boxes,
    }  # fmt: skip
    arrays = {name: np.asarray(getattr(file.items.columns, name)) for name in COLUMNS}
    arrays["tokens"] = fitted.tokens
    found = records.found
    if isinstance(found, Indexed) and "JSON" in form.kind:
        arrays |= {"offsets": np.asarray(found.offsets), "lines": np.asarray(found.lines)}
    write_receipt(path, Receipt(meta, arrays))


def _images(items: Items, found: Mapping[Path, ImageRef]) -> list[list[Any]] | None:
    """The images of a file for its receipt; None if one has just been removed."""
    rows = []
    for path in items.paths:
        facts, ref, stamp = items.inspected[path], found[path], stamp_of(path)
        if not isinstance(facts, ImageFacts) or stamp is None:
            return None
        notes = [[note.kind, note.detail] for note in facts.notes]
        rows.append([str(path), ref.given, ref.address, facts.digest, facts.size, notes, stamp])
    return rows


def stamp_of(path: Path) -> list[int] | None:
    """Size, times of content and inode, and the inode of a file; None if it is not there."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _is_whole(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> bool:
    """Whether the arrays of a receipt fit each other."""
    count, ends, images = len(arrays["record"]), arrays["ends"], arrays["images"]
    records = len(arrays["offsets"]) if "offsets" in arrays else 2**31
    return (
        all(len(arrays[name]) == count for name in (*COLUMNS[:8], "tokens"))
        and bool(((arrays["weight"] >= 0) & (arrays["weight"] <= LARGEST)).all())
        and bool(((arrays["draws"] == 0) | (arrays["draws"] == 1)).all())
        and (not count or int(ends[-1]) == len(images))
        and bool((np.diff(ends, prepend=0) >= 0).all())
        and bool(((images >= 0) & (images < len(meta["images"]))).all())
        and bool(((arrays["record"] >= 0) & (arrays["record"] < records)).all())
    )
