"""Run folders: their names, and checkpoints that are written completely or not at all.

output/<model name>/v<k>-<time>/
  run_config.json  provenance.json  image_digests.txt  split.json  mix.json  metrics.jsonl
  images/*.png  report.html
  checkpoint-<step>/  weights or adapter, run_config.json, state/
  best -> checkpoint-<step>, last -> checkpoint-<step>    symbolic links, or text files with a name
"""

from __future__ import annotations

import functools
import re
import shutil
import time
from typing import TYPE_CHECKING, Any

from vlft.config import SftConfig
from vlft.console import warn
from vlft.errors import CheckpointError, VlftError, raise_all, shown
from vlft.files import (
    LEFT_FILE,
    flush,
    flush_folder,
    is_disk_full,
    json_text,
    read_object,
    read_own,
    real_path,
    without_nulls,
    write_whole,
)
from vlft.schema import (
    ANY,
    BOOL,
    NAMES,
    OBJECT,
    PATTERN,
    PATTERNS,
    TEXT,
    Rule,
    Schema,
    by_pattern,
    either,
    many,
    number,
    table,
    whole,
)
from vlft.settings import convert

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What a kill leaves of one that was being written or removed.
_LEFT = re.compile(r"\.checkpoint-\d+\.(part|old)")
RUN_CONFIG = "run_config.json"
PROVENANCE = "provenance.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PROVENANCE_SCHEMA: Schema = {
    "data": table(TEXT),
    "model_files": table(TEXT),
    "base_weights": TEXT,
    "model_config": TEXT,
    "changes": many(OBJECT),
}
_ADAPTER_SCHEMA: Schema = {
    "base_model_name_or_path": TEXT,
    "r": whole(1, 2**16),
    "lora_alpha": number(0, 1e9),
    "lora_dropout": number(0, 1),
    "rank_pattern": by_pattern(whole(1, 2**16)),
    "alpha_pattern": by_pattern(number(0, 1e9)),
    "bias": Rule("none, all or lora_only", ("none", "all", "lora_only").__contains__),
    "layers_to_transform": either(whole(0, 255), many(whole(0, 255))),
    **dict.fromkeys(("target_modules", "exclude_modules"), either(PATTERN, NAMES)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), NAMES),
    "layers_pattern": either(PATTERN, PATTERNS),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"), BOOL),
}
_warn_once = functools.cache(warn)


def new_run_folder(output_dir: Path, model_name: str) -> Path:
    """A new folder output_dir/model_name/v<k>-<time>; k is one more than the largest there."""
    parent = output_dir / model_name
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [
        int(found[1]) for path in parent.iterdir() if (found := re.match(r"v(\d+)-", path.name))
    ]
    number = max(numbers, default=-1) + 1
    while True:
        folder = parent / f"v{number}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def checkpoints_in(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a run, by step."""
    found = [
        (int(match[1]), path)
        for path in run.iterdir()
        if path.is_dir() and not path.is_symlink() and (match := _CHECKPOINT.fullmatch(path.name))
    ]
    return sorted(found)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that contains a checkpoint; None for one that stands alone."""
    run = checkpoint.parent
    is_there = _CHECKPOINT.fullmatch(checkpoint.name) and (run / RUN_CONFIG).is_file()
    return run if is_there else None


def find_checkpoint(path: Path, *, anywhere: bool = False) -> Path:
    """The checkpoint that a path means: itself, what ``best`` or ``last`` name, or a run's last.

    ``anywhere`` also takes a checkpoint out of its run, under any name, or an adapter of others.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    if not path.exists():
        raise CheckpointError(
            "no such folder", place=str(path), hint="name a run or one of its checkpoint-N"
        )
    folder = _named_by(path) if path.is_file() else real_path(path)
    is_named = _CHECKPOINT.fullmatch(folder.name) or (anywhere and (folder / CONFIG).is_file())
    if (is_named and (folder / RUN_CONFIG).is_file()) or (anywhere and is_adapter(folder)):
        return folder
    found = checkpoints_in(folder) if folder.is_dir() else []
    if found:
        return found[-1][1]
    names = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) if folder.is_dir() else ""
    other = "a folder with an adapter" if anywhere else "in its run and under this name"
    raise CheckpointError(
        f"no checkpoint here; found {names or 'nothing'}",
        place=str(path),
        hint=f"name a run or one of its checkpoint-N folders, {'or ' if anywhere else ''}{other}",
    )


def save_checkpoint(
    run: Path, step: int, write: Callable[[Path], None], *, keep: int | None, best_step: int | None
) -> Path:
    """The new folder ``checkpoint-<step>``: written under a temporary name, flushed, renamed.

    ``write`` writes all files into the folder that it is given. The ``keep`` newest checkpoints
    stay, besides the best; None keeps all.

    Raises:
        VlftError: it could not be written; earlier checkpoints are as they were.
    """
    final = run / f"checkpoint-{step}"
    part = run / f".checkpoint-{step}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write(part)
        flush_folder(part)
        if final.exists():
            remove_checkpoint(final)
        part.rename(final)
        flush(run)
        point(run / "last", final.name)
        if best_step is not None and (run / f"checkpoint-{best_step}").exists():
            point(run / "best", f"checkpoint-{best_step}")
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise _failed_save(final, error) from error
    if keep is not None:
        for old_step, folder in checkpoints_in(run)[:-keep]:
            if old_step != best_step:
                remove_checkpoint(folder)
    return final


def _failed_save(final: Path, error: OSError) -> VlftError:
    """What a user needs to know of a checkpoint that could not be written."""
    run = final.parent
    reason = error.strerror or error
    message = f"the first checkpoint could not be written ({reason})"
    next_step = "start again"
    if checkpoints_in(run):
        message = f"the checkpoint could not be written ({reason}); earlier ones are whole"
        next_step = f"go on with: vlft sft --resume {run}"
    remedy = "make room" if is_disk_full(error) else "correct that"
    return VlftError(message, place=str(final), hint=f"{remedy}, then {next_step}")


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint. A kill meanwhile leaves nothing that looks like a whole one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def sweep(run: Path) -> None:
    """Removes what a kill left of checkpoints and files that were being written or removed."""
    for path in run.iterdir():
        if path.is_symlink():
            continue
        if _LEFT.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
        elif LEFT_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()


def point(link: Path, target: str) -> None:
    """Makes the link name a sibling, in one step; a text file where there are no links."""
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    try:
        part.symlink_to(target)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise
        _warn_once(
            f"{link.parent}: no symbolic links on this file system; best and last are text files"
        )
        part.write_text(target + "\n", "utf-8")
    part.replace(link)


def _named_by(file: Path) -> Path:
    """The checkpoint that a text file in the place of a link names; the file itself if none."""
    with file.open("rb") as text:
        name = text.read(100).decode("utf-8", "replace").strip()
    return real_path(file.parent / name if _CHECKPOINT.fullmatch(name) else file)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json that are not null; their types are checked."""
    found: dict[str, Any] = without_nulls(read_object(folder / ADAPTER_CONFIG, _ADAPTER_SCHEMA))
    return found


def read_provenance(run: Path) -> dict[str, Any]:
    """The fields of provenance.json; their types are checked."""
    return read_own(run / PROVENANCE, _PROVENANCE_SCHEMA)


def write_run_config(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a run into its folder, or into that of a checkpoint."""
    write_whole(folder / RUN_CONFIG, json_text(settings, indent=2) + "\n")


def read_run_config(folder: Path) -> SftConfig:
    """The settings that a run or checkpoint was made with.

    Their combination is not checked, because an older version may have allowed it.

    Raises:
        UsageError: there are none, or their values are wrong.
    """
    path = folder / RUN_CONFIG
    stated = read_object(path, ANY)
    if "model" not in stated:
        raise CheckpointError("has no model", place=shown(path), hint="copy it from a backup")
    # Releases without the setting read special tokens of data as tokens.
    values, problems = convert(SftConfig, {"special_tokens": "keep", **stated}, source=shown(path))
    raise_all(problems)
    return SftConfig(**values)
