"""``--resume``: the settings of the saved run, with those that may change taken from the user.

    kept       what the result so far depends on
    free       no result depends on it
    extended   how long the run is and its learning rate from here on

What a run was extended with stands in the settings of the run folder before the first step, and in
those of its checkpoints from then on. The settings of the run folder decide, so that a run that is
killed before its first new checkpoint still goes to its new end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
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
    from collections.abc import Collection, Mapping

# The settings that extend a run.
EXTENDING = tuple(
    f.name for f in dataclasses.fields(SftConfig) if f.metadata["on_resume"] == "extends"
)


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Attributes:
        checkpoint: to go on from.
        asked: what this command changes in the course of the run: name -> (before, from now on).
        changed: the same, compared with the course that the checkpoint was saved in.
    """

    checkpoint: Path
    asked: Mapping[str, tuple[Any, Any]]
    changed: Mapping[str, tuple[Any, Any]]

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.checkpoint.parent

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.checkpoint.name.removeprefix("checkpoint-"))


def resumed_config(
    given: SftConfig, explicit: Collection[str] | None = None
) -> tuple[SftConfig, Resumed]:
    """The saved run's settings with what this command changes, and where it goes on.

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
    at_checkpoint = read_run_config(checkpoint)
    saved = dataclasses.replace(at_checkpoint, **_extended_before(checkpoint.parent))
    given_json, saved_json = map(to_json, (given, saved))
    if explicit is None:
        explicit = given_names(given)
    problems: list[UsageError] = []
    changes: dict[str, Any] = {}
    for spec in dataclasses.fields(SftConfig):
        name = spec.name
        # What belongs to the command is never taken from the run.
        if name not in given_json or (name in explicit and _may_change(spec, given_json[name])):
            changes[name] = getattr(given, name)
        elif name not in explicit or _says_nothing(spec, given_json[name]):
            continue
        elif _differs(given_json[name], saved_json[name]):
            found = f"found {_text(given_json[name])}, the run has {_text(saved_json[name])}"
            problems.append(ConfigError(found, place=flag(name), hint=_instead(saved)))
    own = saved.eval_metric or ""
    if own.endswith(".py") and "eval_metric" not in explicit:
        found = f"the run has {own}, whose code no file of a run can have run"
        problems.append(ConfigError(found, place="--eval-metric", hint="give the flag again"))
    raise_all(problems)
    if "num_train_epochs" in explicit and "max_steps" not in explicit:
        changes["max_steps"] = None  # It would override the epochs.
    config = dataclasses.replace(saved, **changes)
    # A run that an older version began with a combination that is refused now can go on.
    known = set(map(str, broken_rules(saved.rules())))
    raise_all([broken for broken in broken_rules(config.rules()) if str(broken) not in known])
    asked, changed = (_differences(before, config) for before in (saved, at_checkpoint))
    return config, Resumed(checkpoint, asked, changed)


def _may_change(spec: dataclasses.Field[Any], value: object) -> bool:
    kind = spec.metadata["on_resume"]
    return kind == "free" or (kind == "extends" and not _says_nothing(spec, value))


def _says_nothing(spec: dataclasses.Field[Any], value: object) -> bool:
    """Whether a value leaves the saved one as it is.

    The saved settings hold the resolved value of an auto, and a file may name every setting, those
    without a value too.
    """
    extends = spec.metadata["on_resume"] == "extends"
    return value is None and (spec.metadata["auto"] or extends)


def _extended_before(run: Path) -> dict[str, Any]:
    """The course of the run by the settings in its folder; empty if they cannot be read.

    A checkpoint has settings of its own, so that it can go on without the run's.
    """
    try:
        settings = read_run_config(run)
    except UsageError:
        return {}
    return {name: getattr(settings, name) for name in EXTENDING}


def _differences(before: SftConfig, now: SftConfig) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in EXTENDING}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def _instead(saved: SftConfig) -> str:
    """What to do in the place of changing a setting that a resumed run keeps."""
    flag_of_weights = "--adapter" if saved.tuner == "lora" else "--model"
    return (
        "a resumed run keeps it: leave the flag out, or start a new run from it with "
        f"{flag_of_weights}"
    )


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
