"""Where images and records that are not files of the user are kept.

images/<2 digits>/<SHA-256>     the bytes of an image, once, from wherever they came
images/addresses/<SHA-256>      link to them, by the SHA-256 of the web address
datasets/                       records from Python, see in_memory.py
facts/                          what is known of checked images, see known_facts.py
hub_sets/                       data sets of a hub, see hub_sets.py
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from pathlib import Path

from vlft.files import cache_folder

NAME = "images"
# Folder -> where its files are.
KEPT = {NAME: "*/*", "datasets": "*", "receipts": "*", "facts": "*", "hub_sets": "*/*"}
# Most bytes of an image that is kept.
LARGEST = 100 * 2**20


def path_of(address: str) -> Path:
    """Where the image of an address is once it has been downloaded."""
    name = hashlib.sha256(address.encode(errors="surrogatepass")).hexdigest()
    return cache_folder(NAME) / "addresses" / name


def keep(part: Path, digest: str, link: Path) -> None:
    """Moves a whole file to its name by content, and lets the name by address lead there."""
    blob = cache_folder(NAME) / digest[:2] / digest
    blob.parent.mkdir(exist_ok=True)
    part.replace(blob)
    new = link.with_name(f"{link.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        new.symlink_to(Path("..", blob.parent.name, blob.name))
    except OSError:
        # A file system without links.
        shutil.copyfile(blob, new)
    new.replace(link)


def size_of_cache(name: str) -> tuple[int, int]:
    """Number of the files that a folder keeps, see KEPT, and their bytes."""
    sizes = [
        path.stat().st_size
        for path in cache_folder(name).glob(KEPT[name])
        if path.is_file() and not path.is_symlink()
    ]
    return len(sizes), sum(sizes)


def clear_kept(name: str) -> list[str]:
    """Removes all of them; returns what could not be removed and why."""
    problems: list[str] = []
    for path in [*cache_folder(name).glob(KEPT[name]), *cache_folder(name).glob("*/")]:
        try:
            path.rmdir() if path.is_dir() else path.unlink()
        except OSError as error:
            problems.append(f"{error.filename}: {error.strerror}")
    return problems
