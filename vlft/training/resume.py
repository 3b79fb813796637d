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
from vlft.settings import broken_rules, flag, given_names, to_json

if TYPE_CHECKING:
    from collections.abc import Collection


def resumed_config(
    given: SftConfig, explicit: Collection[str] | None = None
) -> tuple[SftConfig, Path]:
    """The saved run's settings and the checkpoint to go on from.

    Args:
        given: settings of this command; ``resume`` is set.
        explicit: names of the settings that the user wrote; None takes those that ``given`` knows
            of.

    Raises:
        UsageError: a given setting differs from the saved one and a result depends on it.
    """
    if given.resume is None:
        raise ValueError("resumed_config needs given.resume")
    checkpoint = find_checkpoint(given.resume)
    saved = read_run_config(checkpoint)
    given_json, saved_json = map(to_json, (given, saved))
    if explicit is None:
        explicit = given_names(given)
    problems: list[UsageError] = []
    changes: dict[str, Any] = {}
    for spec in dataclasses.fields(SftConfig):
        name = spec.name
        # What belongs to the command is never taken from the run.
        if name not in given_json or (name in explicit and spec.metadata["resumable"]):
            changes[name] = getattr(given, name)
        elif name not in explicit or (spec.metadata["auto"] and given_json[name] is None):
            continue  # The saved settings hold the resolved value of an auto.
        elif _differs(given_json[name], saved_json[name]):
            found = f"found {_text(given_json[name])}, the run has {_text(saved_json[name])}"
            hint = "a resumed run keeps its settings: leave the flag out, or start a new run"
            problems.append(ConfigError(found, place=flag(name), hint=hint))
    raise_all(problems)
    config = dataclasses.replace(saved, **changes)
    # A run that an older version began with a combination that is refused now can go on.
    known = set(map(str, broken_rules(saved.rules())))
    raise_all([broken for broken in broken_rules(config.rules()) if str(broken) not in known])
    return config, checkpoint


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
    if isinstance(given, list | tuple) and isinstance(saved, list | tuple):
        return len(given) != len(saved) or any(map(_differs, given, saved))
    is_same_path = isinstance(given, str) and str(Path(given).absolute()) == saved
    return given not in ("auto", saved) and not is_same_path


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else repr(value)
