"""Data sets of a hub -> a folder in the user's cache, which is then read as any other.

    hf:owner/name[/subset][@revision][:split]      Hugging Face
    ms:owner/name[/subset][@revision][:split]      ModelScope

hub_sets/<hub>-<owner>--<name>--<subset>@<commit>--<split>/    data.arrow, state.json

The ``datasets`` library downloads them and finds their splits; it runs no code of a data set. What
it returns is kept as it is: images that a row names by path or address are opened by vlft alone,
under the rules for all records.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.console import info
from vlft.errors import DataError, shown
from vlft.files import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "hub_sets"
HUBS = {"hf:": "Hugging Face", "ms:": "ModelScope"}
SPEC = re.compile(
    r"(hf|ms):(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?",
    re.ASCII,
)
COMMIT = re.compile("[0-9a-f]{40}")
FORM = "write hf:owner/name:split, hf:owner/name/subset:split or hf:owner/name@revision:split"
INSTALL = "pip install 'vlft[datasets]'"


def is_hub_set(spec: str) -> bool:
    """Whether a text after ``--dataset`` means a data set of a hub."""
    return spec.startswith(tuple(HUBS)) and not Path(spec).exists()


@functools.cache
def hub_folder(spec: str) -> str:
    """The folder of a hub's data set, downloaded unless it is there; ``#N`` behind it stays.

    Raises:
        DataError: the set, its subset or split is not named fully, or the hub does not give it.
    """
    text, mark, amount = spec.partition("#")
    parts = SPEC.fullmatch(text)
    if parts is None:
        raise DataError("is no data set of a hub", place=shown(spec), hint=FORM)
    kept = _kept(parts)
    if kept is None:
        library = _library(shown(spec))
        try:
            kept = _download(library, parts, shown(text))
        except _faults(library) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = " ".join(lines[:2])[:300] or type(error).__name__
            hint = "check the name, the revision and the network, or name a file" + _others(parts)
            found = f"{HUBS[text[:3]]} did not give it: {reason}"
            raise DataError(found, place=shown(text), hint=hint) from None
    return f"{kept}{mark}{amount}"


def _kept(parts: re.Match[str]) -> Path | None:
    """The folder of a set whose commit and split are named, if it is there."""
    if parts["split"] and COMMIT.fullmatch(parts["revision"] or ""):
        folders = sorted(cache_folder(NAME).glob(_folder_name(parts, parts["revision"], "*")))
        folders = [path for path in folders if path.name.endswith(f"--{parts['split']}")]
        return folders[0] if len(folders) == 1 else None
    return None


def _others(parts: re.Match[str]) -> str:
    """What of the set is in the cache, for a hint."""
    found = sorted(cache_folder(NAME).glob(_folder_name(parts, "*", "*")))
    return f"; in the cache: {', '.join(map(shown, found))}" if found else ""


def _folder_name(parts: re.Match[str], commit: str, split: str) -> str:
    name, subset = parts["name"].replace("/", "--"), parts["subset"] or "default"
    return f"{parts[1]}-{name}--{subset}@{commit.replace('/', '-')}--{split}"


def _library(place: str) -> Any:
    try:
        import datasets
        import datasets.exceptions
    except ImportError:
        found = "data sets of a hub need datasets, which is not installed"
        raise DataError(found, place=place, hint=INSTALL) from None
    return datasets


def _faults(library: Any) -> tuple[type[BaseException], ...]:
    """The errors of the libraries, which are of many kinds, also for what a user has mistyped."""
    from huggingface_hub.errors import HfHubHTTPError

    # Beside OSError its bases have those of the HTTP library, which differs between versions.
    http = HfHubHTTPError.__bases__
    return (*http, library.exceptions.DatasetsError, ValueError, RuntimeError, LookupError)


def _download(library: Any, parts: re.Match[str], place: str) -> Path:
    """Downloads a set into the cache; returns its folder.

    Raises:
        DataError: the subset or the split is not named, and there are several.
    """
    asked = parts["revision"]
    if parts[1] == "ms":
        source, commit = str(_from_modelscope(parts["name"], asked, place)), asked or "master"
        revision = None
    else:
        source = parts["name"]
        revision = commit = _commit(source, asked)
    names = library.get_dataset_config_names(source, revision=revision)
    subset = _one(parts["subset"], names, "subset", place)
    splits = library.get_dataset_split_names(source, subset, revision=revision)
    split = _one(parts["split"], splits, "split", place)
    folder = cache_folder(NAME) / _folder_name(parts, commit, split)
    if not folder.is_dir() or parts[1] == "ms":
        table = library.load_dataset(source, subset, split=split, revision=revision).data.table
        _write(table, folder)
    info(f"{place}: revision {commit}, split {split}, kept in {shown(folder)}")
    return folder


def _one(asked: str | None, there: Sequence[str], what: str, place: str) -> str:
    """The subset or split that is asked for, or the only one.

    Raises:
        DataError: there are several, or not the one that is asked for.
    """
    if asked in there:
        return str(asked)
    if asked is None and len(there) == 1:
        return there[0]
    found = f"has no {what} {asked}" if asked else f"has {len(there)} {what}s; which is not said"
    form = "hf:owner/name:SPLIT" if what == "split" else "hf:owner/name/SUBSET:split"
    names = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
    raise DataError(found, place=place, hint=f"write {form}, with one of {names}")


def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch, a tag or None means today."""
    from huggingface_hub import HfApi

    if COMMIT.fullmatch(revision or ""):
        return str(revision)
    return str(HfApi().dataset_info(name, revision=revision).sha)


def _from_modelscope(name: str, revision: str | None, place: str) -> Path:
    """The folder with the files of a set, without its scripts."""
    try:
        from modelscope import dataset_snapshot_download
    except ImportError:
        found = "data sets of ModelScope need modelscope, which is not installed"
        raise DataError(found, place=place, hint="pip install 'vlft[modelscope]'") from None
    given = {} if revision is None else {"revision": revision}
    return Path(dataset_snapshot_download(name, ignore_file_pattern=["*.py"], **given))


def _write(table: Any, folder: Path) -> None:
    """Writes a table as a folder of save_to_disk, whole or not at all."""
    import pyarrow

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        with pyarrow.ipc.new_stream(str(part / "data.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
        state = {"_data_files": [{"filename": "data.arrow"}]}
        (part / "state.json").write_text(json.dumps(state), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
