"""Fields of a settings dataclass, and checked settings from values of flags, files and Python."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import reprlib
import types
import typing
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from vlft.console import warn
from vlft.errors import ConfigError, UsageError, raise_all

if typing.TYPE_CHECKING:
    from collections.abc import Mapping


class Settings(Protocol):
    """A frozen dataclass whose fields are made by ``setting``."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def problems(self) -> list[UsageError]:
        """Combinations of settings that cannot be used; ``build`` checks each value alone."""
        return []

    def unused(self) -> list[str]:
        """The settings that have no effect, each with the reason."""
        return []


Config = TypeVar("Config", bound=Settings)

# Types as messages name them.
IN_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    list: "a list",
    type(None): "nothing",
}
LARGEST_INT = 2**63 - 1


def setting(
    default: Any,
    help: str,
    *,
    panel: str,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    resumable: bool = False,
    default_text: str = "",
    argument: bool = False,
    auto: bool = False,
    path: bool = False,
    scope: str = "run",
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: used where neither a flag nor the file gives a value; written nowhere else.
        help: one line for ``--help``.
        panel: the group in ``--help``.
        choices: the allowed words; empty if any text is allowed.
        minimum: smallest allowed number; ``above`` is not allowed itself.
        above: see minimum.
        maximum: largest allowed number.
        resumable: whether a resumed run may change it, because no result depends on it.
        default_text: the default as ``--help`` shows it, where the value itself says too little.
        argument: given by its place on the command line, not by a flag.
        auto: whether the word ``auto``, read as None, is allowed instead of a number.
        path: whether a text may be a path, whose ``~`` is the home folder.
        scope: ``run`` is saved with the run, ``command`` is not; ``flag`` is not read from a file
            either, so that no file can continue a run or remove its checkpoints.
    """
    metadata = {key: value for key, value in locals().items() if key != "default"}
    if isinstance(default, tuple):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The flag of a field: ``lora_rank`` -> ``--lora-rank``."""
    return "--" + name.replace("_", "-")


def changed(config: Any, *names: str) -> str:
    """The flags, with commas between, of those settings that do not have their default."""
    return ", ".join(
        flag(name) for name in names if getattr(config, name) != getattr(type(config), name, ())
    )


def expand_home(path: str) -> str:
    """The path with the home folder in the place of its ``~``."""
    # Path.expanduser raises RuntimeError for the ~name of an unknown user; this leaves it alone.
    return os.path.expanduser(path)  # noqa: PTH111


def field_type(cls: type, name: str) -> Any:
    """The type of a field's value; of an item, if it is a tuple; without ``None``."""
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def is_repeatable(cls: type, name: str) -> bool:
    """Whether a field holds many values, a flag for each."""
    return typing.get_origin(typing.get_type_hints(cls)[name]) is tuple


def build(cls: type[Config], values: Mapping[str, Any], *, source: str = "") -> Config:
    """A checked config from named values.

    Args:
        cls: one of the settings dataclasses.
        values: by field name; what is absent keeps its default.
        source: the file that the values come from, for messages; empty for flags.

    Raises:
        UsageError: all problems of single values together, or all wrong combinations.
    """
    converted, problems = convert(cls, values, source=source)
    raise_all(problems)
    config = cls(**converted)
    raise_all(config.problems())
    return config


def convert(
    cls: type, values: Mapping[str, Any], *, source: str = ""
) -> tuple[dict[str, Any], list[UsageError]]:
    """The values in the types of their fields, and the problems found; see ``build``."""
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
            converted[name] = _value(cls, fields[name], value, place)
        except UsageError as error:
            problems.append(error)
    return converted, problems


def check(config: Config) -> Config:
    """The config, converted and checked by ``build``; says which settings have no effect.

    Every command begins with it, because settings may come from Python.

    Raises:
        UsageError: one or many.
    """
    checked = build(type(config), dataclasses.asdict(config))
    for sentence in checked.unused():
        warn(sentence)
    return checked


def to_json(config: Any) -> dict[str, Any]:
    """The settings that are saved with a run, as JSON values, which ``build`` reads back."""
    saved = {f.name for f in dataclasses.fields(config) if f.metadata["scope"] == "run"}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(config).items()
        if name in saved
    }


def unknown_name(name: str, known: list[str], *, place: str, what: str) -> ConfigError:
    """The error for a name that does not exist; its hint is the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
    return ConfigError(f"unknown {what} {name!r}", place=place, hint=hint)


def _value(cls: type, spec: dataclasses.Field[Any], value: Any, place: str) -> Any:
    """The value in the field's type.

    Raises:
        ConfigError: it has another type, or is outside the field's limits.
    """
    if value is None:
        if type(None) in typing.get_args(typing.get_type_hints(cls)[spec.name]):
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
        values = tuple(_scalar(value_type, item, place) for item in items)
        return tuple(map(expand_home, values)) if spec.metadata["path"] else values
    converted = _scalar(value_type, value, place)
    _check_limits(spec.metadata, converted, place)
    return expand_home(converted) if spec.metadata["path"] else converted


def _scalar(value_type: Any, value: Any, place: str) -> Any:
    if value_type is Path and isinstance(value, str | Path):
        return Path(expand_home(str(value)))
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
    if choices and value not in choices:
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
