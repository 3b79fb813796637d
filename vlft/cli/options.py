"""Command line and file of settings -> one checked settings dataclass.

    vlft sft --dataset a.jsonl b.jsonl --lora_rank=16 --use-dora false --config run.yaml

Names and defaults are in ``vlft.config`` alone. Names may have underscores or be ms-swift's, a
boolean flag takes ``true``, ``false`` or nothing, and a repeatable one takes several values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlft.cli.config_file import read_config_file
from vlft.cli.ms_swift import INSTEAD, SYNONYMS, aliases
from vlft.console import warn
from vlft.errors import ConfigError, UsageError, raise_all
from vlft.files import expand_home
from vlft.settings import (
    Config,
    build,
    chosen,
    convert,
    field_type,
    flag,
    is_repeatable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

# A word that can only be a flag; other words that begin with a hyphen are values.
FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
BOOLEANS = {"true": True, "false": False}


class _Flag(NamedTuple):
    """What a flag sets."""

    name: str  # of the setting
    value_type: Any  # of its value, or of one of them
    repeatable: bool = False
    negative: bool = False  # the --no-x of a boolean


def read_settings(cls: type[Config], command: str, words: Sequence[str]) -> tuple[Config, set[str]]:
    """The settings in the words after a command, and the names of those given by flag or file.

    Raises:
        UsageError: one or many; what is wrong with single flags and settings is shown together.
    """
    given, problems = _read_words(cls, command, words)
    given.pop("debug", None)
    file = given.pop("config", None)
    table, wrong_in_file = ({}, []) if file is None else _read_file(cls, Path(expand_home(file)))
    values, wrong = convert(cls, given)
    raise_all([*wrong_in_file, *problems, *wrong])
    return build(cls, {**chosen(cls, table), **values}), {*table, *values}


def _names(cls: type) -> dict[str, str]:
    """Every name of a setting, aliases included -> the name of its field."""
    own = {spec.name: spec.name for spec in dataclasses.fields(cls)}
    return aliases(own.keys()) | own


def _read_file(cls: type, path: Path) -> tuple[dict[str, Any], list[UsageError]]:
    """The settings in a file, by field, and the problems found."""
    names, table = _names(cls), {}
    flags_only = {f.name for f in dataclasses.fields(cls) if f.metadata["scope"] == "flag"}
    problems: list[UsageError] = []
    for key, value in read_config_file(path).items():
        name, place = names.get(key, key), f"{path}: {key}"
        if name in table:
            problems.append(ConfigError(f"the same setting as {name!r}, given twice", place=place))
        elif key not in names and key in INSTEAD:
            found = f"unknown setting {key!r}"
            problems.append(ConfigError(found, place=place, hint=INSTEAD[key]))
        else:
            table[name] = _our_word(name, value)
    # Older versions saved these with a run, whose file would continue that run again.
    dropped = [flag(name) for name in flags_only & table.keys() if table.pop(name)]
    if dropped:
        warn(f"{path}: {', '.join(sorted(dropped))} not taken from a file; write it as a flag")
    converted, wrong = convert(cls, table, source=str(path))
    return converted, [*problems, *wrong, *_own_code(cls, converted, path)]


def _own_code(cls: type, table: dict[str, Any], path: Path) -> list[UsageError]:
    """The problems of settings that name a file of code: only a flag or Python may have one run."""
    problems: list[UsageError] = []
    for spec in dataclasses.fields(cls):
        value = table.get(spec.name, ())
        named = [v for v in (value if isinstance(value, tuple) else (value,)) if _is_code(spec, v)]
        if named:
            found = f"found {', '.join(named)}, whose code no file of settings can have run"
            hint = f"write it as a flag: {flag(spec.name)} {' '.join(named)}"
            problems.append(ConfigError(found, place=f"{path}: {spec.name}", hint=hint))
    return problems


def _is_code(spec: dataclasses.Field[Any], value: Any) -> bool:
    return "FILE.py" in spec.metadata["choices"] and str(value).endswith(".py")


def _our_word(name: str, value: Any) -> Any:
    """The value of a setting, a synonym replaced by our own word."""
    return SYNONYMS.get(name, {}).get(value, value) if isinstance(value, str) else value


def _read_words(
    cls: type, command: str, words: Sequence[str]
) -> tuple[dict[str, Any], list[UsageError]]:
    """The settings in the words of a command line, by field, and the problems found."""
    flags = _flags(cls)
    arguments = [spec.name for spec in dataclasses.fields(cls) if spec.metadata["argument"]]
    given: dict[str, Any] = {}
    problems: list[UsageError] = []
    alone: list[str] = []
    for typed, values in _groups(words):
        known = flags.get(typed.replace("-", "_"))
        if not typed:
            alone += values
        elif known is None:
            problems.append(_unknown_flag(typed, command, flags))
        else:
            try:
                value, rest = _take(known, typed, values, bool(arguments))
            except ConfigError as error:
                problems.append(error)
                continue
            alone += rest
            before = given.get(known.name, []) if known.repeatable else None
            given[known.name] = value if before is None else [*before, *value]
    if arguments and is_repeatable(cls, arguments[-1]):
        # All the words, and those after the flag of the same name.
        return given | {arguments[-1]: [*given.get(arguments[-1], []), *alone]}, problems
    place = f"vlft {command}"
    for word in alone[len(arguments) :]:
        hint = f"{place} --help lists the flags"
        problems.append(ConfigError(f"found {word!r} without a flag", place=place, hint=hint))
    return given | dict(zip(arguments, alone, strict=False)), problems


def _groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The flags without dashes, each with the words up to the next; ``""`` has those before."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        found = FLAG.fullmatch(word)
        if found:
            groups.append((found[1], [] if found[2] is None else [found[2]]))
        else:
            groups[-1][1].append(word)
    return groups


def _flags(cls: type) -> dict[str, _Flag]:
    """All flags of a command, by name with underscores."""
    flags = {"config": _Flag("config", str), "debug": _Flag("debug", bool)}
    for name, field_name in _names(cls).items():
        value_type = field_type(cls, field_name)
        flags[name] = _Flag(field_name, value_type, is_repeatable(cls, field_name))
        if value_type is bool:
            flags[f"no_{name}"] = _Flag(field_name, value_type, negative=True)
    # An argument that takes many words has a flag too.
    arguments = [
        spec.name
        for spec in dataclasses.fields(cls)
        if spec.metadata["argument"] and not is_repeatable(cls, spec.name)
    ]
    return {name: known for name, known in flags.items() if name not in arguments}


def _take(
    known: _Flag, typed: str, values: list[str], has_arguments: bool
) -> tuple[Any, list[str]]:
    """The value of a flag, and those of the words after it that are arguments of the command.

    Raises:
        ConfigError: too few words, too many, or one that is not allowed.
    """
    place = f"--{typed}"
    if known.value_type is bool:
        is_given = bool(values) and values[0].lower() in BOOLEANS and not known.negative
        rest = values[is_given:]
        if rest and not has_arguments:
            allowed = "no value" if known.negative else "true or false"
            raise ConfigError(f"found {' '.join(rest)!r}, {allowed} is allowed", place=place)
        return BOOLEANS[values[0].lower()] if is_given else not known.negative, rest
    if not values:
        raise ConfigError("found nothing, a value is needed", place=place)
    if known.repeatable:
        return values, []
    value, *rest = values
    if rest and not has_arguments:
        hint = "put quotes around a value with spaces, commas between several names"
        raise ConfigError(f"found {len(values)} values, one is allowed", place=place, hint=hint)
    if known.value_type is int and re.fullmatch(r"[+-]?\d{1,4000}", value):
        return int(value), rest
    return _our_word(known.name, value), rest


def _unknown_flag(typed: str, command: str, flags: dict[str, _Flag]) -> ConfigError:
    """The error for an unknown flag; its hint is what to write instead, or the nearest flag."""
    place = f"vlft {command}"
    hint = INSTEAD.get(typed.replace("-", "_"), "")
    if not hint:
        own = [flag(name) for name, known in flags.items() if name.endswith(known.name)]
        near = difflib.get_close_matches(f"--{typed}", own, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{place} --help lists the flags"
    return ConfigError(f"unknown flag '--{typed}'", place=place, hint=hint)
