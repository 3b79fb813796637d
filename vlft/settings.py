"""Fields of a settings dataclass, and checked settings from values of flags, files and Python."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from vlft.console import warn
from vlft.errors import ConfigError, UsageError, raise_all, unknown_name
from vlft.files import expand_home

if typing.TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# A combination of settings: whether it is there, the flags, what is wrong with them, what to do.
# With None for the last, the flags only have no effect, and the text says why.
Rule = tuple[object, str, str, str | None]


class Settings(Protocol):
    """Base of the configuration classes; each field is declared with ``setting``.

    An instance remembers which values were passed, so that a flag that cannot act is refused even
    when its value equals the default.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _given: frozenset[str] = frozenset()

    def __new__(cls, **values: Any) -> Self:
        """Remembers the names of the values, which may be equal to the defaults."""
        config = super().__new__(cls)
        object.__setattr__(config, "_given", frozenset(chosen(cls, values)))
        return config

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        return ()


Config = TypeVar("Config", bound=Settings)

# Types as messages name them.
IN_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path",
    list: "a list", type(None): "nothing",
}  # fmt: skip
LARGEST_INT = 2**63 - 1
_type_hints = functools.cache(typing.get_type_hints)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What a setting is besides its name, type and default."""

    help: str  # one line for --help
    panel: str  # the group in --help
    choices: tuple[str, ...] = ()  # the allowed words, FILE.py for paths to such; empty: any text
    minimum: float | None = None  # the smallest allowed number
    above: float | None = None  # the number must be greater than this
    maximum: float | None = None  # the largest allowed number
    on_resume: Literal["kept", "free", "extends"] = "kept"  # see vlft/training/resume.py
    default_text: str = ""  # the default in --help, where the value itself says too little
    argument: bool = False  # whether its place on the command line gives it, not a flag
    auto: bool = False  # whether the word auto, read as None, is allowed for a number
    path: bool = False  # whether a text may be a path, whose ~ is the home folder
    records: bool = False  # whether Python may give records in the place of files
    # A run setting is saved with the run, one of the command is not. A flag is not read from a file
    # either, so that no file can continue a run or remove its checkpoints.
    scope: Literal["run", "command", "flag"] = "run"


def setting(default: Any, help: str, **traits: Any) -> Any:
    """A field of a settings dataclass; its default is written nowhere else."""
    metadata = vars(Traits(help=help, **traits))
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The flag of a field: ``lora_rank`` -> ``--lora-rank``."""
    return "--" + name.replace("_", "-")


def changed(config: Any, *names: str) -> str:
    """The flags, with commas between, of those settings that do not have their default."""
    return ", ".join(flag(name) for name in names if _is_changed(config, name))


def given(config: Any, *names: str) -> str:
    """The flags, with commas between, of those settings that were given, be it their default."""
    return ", ".join(flag(name) for name in names if name in given_names(config))


def given_names(config: Any) -> list[str]:
    """The names of the settings that were given, be it their default."""
    names = config.__dataclass_fields__
    return [name for name in names if name in config._given or _is_changed(config, name)]


def chosen(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that somebody chose.

    Who names most of the settings repeats what is there, as ``dataclasses.replace`` and the file
    that is saved with a run do, and has chosen what is not the default.
    """
    repeated = 2 * len(values) > len(dataclasses.fields(cls))
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (repeated and value == getattr(cls, name, ()))
    }


def field_type(cls: type, name: str) -> Any:
    """The type of a field's value; of an item, if it is a tuple; without ``None``."""
    hint = _type_hints(cls)[name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def is_repeatable(cls: type, name: str) -> bool:
    """Whether a field holds many values, a flag for each."""
    return typing.get_origin(_type_hints(cls)[name]) is tuple


def build(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """A checked config from values by field name; what is absent keeps its default.

    Raises:
        UsageError: all problems of single values together, or all wrong combinations.
    """
    converted, problems = convert(cls, values)
    raise_all(problems)
    config = cls(**converted)
    raise_all(broken_rules(config.rules()))
    return config


def broken_rules(rules: Iterable[Rule]) -> list[UsageError]:
    """The errors of the combinations that are there and are not allowed."""
    return [
        ConfigError(text, place=flags, hint=hint)
        for applies, flags, text, hint in rules
        if applies and hint is not None
    ]


def convert(
    cls: type, values: Mapping[str, Any], *, source: str = ""
) -> tuple[dict[str, Any], list[UsageError]]:
    """The values in the types of their fields, and the problems found.

    Args:
        cls: one of the settings dataclasses.
        values: by field name.
        source: the file that the values come from, for messages; empty for flags.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    problems: list[UsageError] = []
    converted = {}
    for name, value in values.items():
        place = f"{source}: {name}" if source else flag(name)
        if name not in fields:
            problems.append(unknown_name(name, list(fields), place=place, what="setting"))
            continue
        if not source and fields[name].metadata["argument"]:
            place = name.upper()
        try:
            converted[name] = _value(cls, fields[name], value, place, is_python=not source)
        except UsageError as error:
            problems.append(error)
    return converted, problems


def check(config: Config) -> Config:
    """The config, converted and checked by ``build``; says which settings have no effect.

    Every command begins with it, because settings may come from Python.

    Raises:
        UsageError: one or many.
    """
    values = dataclasses.asdict(config)
    checked = build(type(config), {name: values[name] for name in given_names(config)})
    for applies, flags, reason, hint in checked.rules():
        if applies and flags and hint is None:
            warn(f"{flags} {'have' if ', ' in flags else 'has'} no effect: {reason}")
    return checked


def to_json(config: Any) -> dict[str, Any]:
    """The settings that are saved with a run, as JSON values, which ``build`` reads back."""
    saved = [f.name for f in dataclasses.fields(config) if f.metadata["scope"] == "run"]
    return {name: _as_json(getattr(config, name)) for name in saved}


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_json, value))
    return str(value) if isinstance(value, Path) else value


def _is_changed(config: Any, name: str) -> bool:
    """Whether a setting does not have its default."""
    return bool(getattr(config, name) != getattr(type(config), name, ()))


def _value(
    cls: type, spec: dataclasses.Field[Any], value: Any, place: str, *, is_python: bool
) -> Any:
    """The value in the field's type; Python may give records in the place of files.

    Raises:
        ConfigError: it has another type, or is outside the field's limits.
    """
    if value is None:
        if type(None) in typing.get_args(_type_hints(cls)[spec.name]):
            return None
        raise ConfigError("found nothing, a value is needed", place=place)
    if spec.metadata["auto"] and isinstance(value, str):
        if value == "auto":
            return None
        if not value.isdecimal():
            raise ConfigError(f"found {value!r}, a whole number or auto is allowed", place=place)
        # On the command line such a number is still text.
        value = int(value)
    value_type = field_type(cls, spec.name)
    if is_repeatable(cls, spec.name):
        items = value if isinstance(value, list | tuple) else [value]
        is_records = is_python and spec.metadata["records"]
        if is_records and any(isinstance(item, dict) for item in items):
            return tuple(items)
        values = tuple(_scalar(value_type, item, place) for item in items)
        for item in values:
            _check_limits(spec.metadata, item, place)
        return tuple(_path(v, place) for v in values) if spec.metadata["path"] else values
    converted = _scalar(value_type, value, place)
    _check_limits(spec.metadata, converted, place)
    return _path(converted, place) if spec.metadata["path"] else converted


def _path(text: str, place: str) -> str:
    """The path with the home folder in the place of its ``~``.

    Raises:
        ConfigError: no file can have this name.
    """
    if "\0" in text:
        raise ConfigError(f"found {text!r}, a path without NUL is allowed", place=place)
    return expand_home(text)


def _scalar(value_type: Any, value: Any, place: str) -> Any:
    if value_type is Path and isinstance(value, str | Path):
        return Path(_path(str(value), place))
    if value_type is str and isinstance(value, Path):
        return str(value)
    if value_type is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML reads 1e-4 as text.
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, value_type) and not (value_type is int and isinstance(value, bool)):
        return value
    raise ConfigError(
        f"found {reprlib.repr(value)}, {IN_WORDS[value_type]} is allowed", place=place
    )


def _check_limits(metadata: Mapping[str, Any], value: Any, place: str) -> None:
    choices = metadata["choices"]
    endings = tuple(word[4:] for word in choices if word.startswith("FILE"))
    if choices and value not in choices and not value.endswith(endings):
        raise ConfigError(f"found {value!r}", place=place, hint=f"allowed: {', '.join(choices)}")
    minimum, above, maximum = (metadata[key] for key in ("minimum", "above", "maximum"))
    if isinstance(value, int) and maximum is None:
        maximum = LARGEST_INT
    for broken, words in (
        (minimum is not None and value < minimum, f"at least {minimum}"),
        (above is not None and value <= above, f"more than {above}"),
        (maximum is not None and value > maximum, f"at most {maximum}"),
    ):
        if broken:
            found = reprlib.repr(value) if isinstance(value, int) else f"{value:g}"
            raise ConfigError(f"found {found}, {words} is allowed", place=place)
