"""The files of a folder that are uploaded, without what belongs to this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_CONFIG
from vlft.errors import CheckpointError, shown
from vlft.files import json_text, read_object
from vlft.schema import ANY
from vlft.settings import to_json
from vlft.sharing.card import NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlft.config import SftConfig
    from vlft.sharing.source import Source

# Of an adapter, all; of a model those with these endings too.
OF_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_CONFIG, NAME)
ENDINGS = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md")
# Fields of transformers' and peft's files that hold where a model was loaded from.
LOADED_FROM = ("base_model_name_or_path", "_name_or_path", "name_or_path")


def contents(source: Source) -> list[tuple[str, bytes | str]]:
    """(name, content) of each file: the path of a large one, the bytes of one that is changed.

    Raises:
        CheckpointError: there are no weights, or links in the place of files.
    """
    found = list(_files(source))
    if not any(name.endswith(".safetensors") for name, _ in found):
        hint = "name a folder with weights in safetensors"
        raise CheckpointError("holds no weights", place=shown(source.folder), hint=hint)
    return found


def _files(source: Source) -> Iterator[tuple[str, bytes | str]]:
    for path in sorted(source.folder.iterdir()):
        wanted = path.name in OF_ADAPTER if source.is_adapter else _is_of_model(path.name)
        if not wanted or not path.is_file():
            continue
        if path.is_symlink():
            hint = "put a copy of the file in its place: links may lead to files of any kind"
            raise CheckpointError("a link", place=shown(path), hint=hint)
        if path.name == RUN_CONFIG:
            if source.settings is not None:
                text = json_text(_elsewhere(source.settings, source), indent=2) + "\n"
                yield path.name, text.encode()
        elif path.suffix == ".json":
            yield path.name, _without_paths(path, source)
        else:
            yield path.name, str(path)


def _is_of_model(name: str) -> bool:
    return not name.startswith(".") and (name.endswith(ENDINGS) or name.startswith("LICENSE"))


def _without_paths(path: Path, source: Source) -> bytes | str:
    """The file, or its content with the base's name in the place of a folder of this machine."""
    fields = read_object(path, ANY)
    changed = dict(fields)
    for name in LOADED_FROM:
        value = fields.get(name)
        if isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
            changed[name] = source.base_name
    if changed == fields:
        return str(path)
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _elsewhere(settings: SftConfig, source: Source) -> dict[str, Any]:
    """The settings of a run for another machine: names in the place of folders."""

    def names(specs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(Path(spec).name for spec in specs)

    moved = dataclasses.replace(
        settings,
        model=source.base_name,
        dataset=names(settings.dataset),
        val_dataset=names(settings.val_dataset),
        image_root=None,
        confine_images=None,
        adapter=None,
        eval_metric=None,
        output_dir=Path("output"),
    )
    return to_json(moved)
