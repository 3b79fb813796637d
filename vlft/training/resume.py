"""``--resume``: the settings of the saved run, with those that may change taken from the user."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoints.runs import (
    checkpoints_in,
    find_checkpoint,
    read_run_config,
    remove_checkpoint,
)
from vlft.config import SftConfig
from vlft.errors import CheckpointError, ConfigError, UsageError, raise_all
from vlft.settings import build, flag, to_json

if TYPE_CHECKING:
    from collections.abc import Collection


def resumed_config(
    given: SftConfig, explicit: Collection[str] | None = None
) -> tuple[SftConfig, Path]:
    """The saved run's settings and the checkpoint to go on from.

    Args:
        given: settings of this command; ``resume`` is set.
        explicit: names of the settings that the user wrote; None takes those that differ from
            their defaults.

    Raises:
        UsageError: a given setting differs from the saved one and a result depends on it.
    """
    if given.resume is None:
        raise ValueError("resumed_config needs given.resume")
    checkpoint = find_checkpoint(given.resume)
    saved_json = read_run_config(checkpoint)
    saved = build(SftConfig, saved_json, source=str(checkpoint / "run_config.json"))
    given_json = to_json(given)
    defaults = to_json(SftConfig(dataset=()))
    if explicit is None:
        explicit = [name for name in given_json if given_json[name] != defaults[name]]
    problems: list[UsageError] = []
    changes: dict[str, Any] = {}
    for spec in dataclasses.fields(SftConfig):
        if spec.name not in explicit:
            continue
        if spec.metadata["resumable"]:
            changes[spec.name] = getattr(given, spec.name)
        elif spec.metadata["auto"] and given_json[spec.name] is None:
            continue  # The saved settings hold its resolved value.
        elif _differs(given_json[spec.name], to_json(saved)[spec.name]):
            problems.append(
                ConfigError(
                    f"found {_text(given_json[spec.name])}, the run has "
                    f"{_text(saved_json.get(spec.name))}",
                    place=flag(spec.name),
                    hint="a resumed run keeps its settings: leave the flag out, or start a new run",
                )
            )
    raise_all(problems)
    # Never taken from saved settings, because it removes checkpoints.
    changes["overwrite"] = given.overwrite
    return dataclasses.replace(saved, **changes), checkpoint


def drop_later_checkpoints(run: Path, step: int, *, overwrite: bool) -> None:
    """Removes the checkpoints after the resumed one, if that is allowed.

    Raises:
        CheckpointError: there are some, and overwriting was not asked for.
    """
    later = [path for number, path in checkpoints_in(run) if number > step]
    if later and not overwrite:
        raise CheckpointError(
            f"the run goes on to {later[-1].name}",
            place=str(run / f"checkpoint-{step}"),
            hint=f"resume {run} instead, or add --overwrite to remove what came after",
        )
    for path in later:
        remove_checkpoint(path)


def _differs(given: object, saved: object) -> bool:
    """Whether two settings differ; ``auto`` equals anything, and paths are compared absolute."""
    if given == "auto":
        return False
    if isinstance(given, str) and isinstance(saved, str):
        return given != saved and str(Path(given).absolute()) != saved
    if isinstance(given, list | tuple) and isinstance(saved, list | tuple):
        return len(given) != len(saved) or any(
            _differs(left, right) for left, right in zip(given, saved, strict=True)
        )
    return given != saved


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else repr(value)
