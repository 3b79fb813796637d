"""Settings dataclass -> command line options. Names and defaults are written there only."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from vlft.errors import UsageError
from vlft.settings import Config, build, field_type, flag, read_config_file

if typing.TYPE_CHECKING:
    from collections.abc import Callable


def command_function(
    cls: type[Config], work: Callable[[Config, set[str]], None]
) -> Callable[..., None]:
    """A function that Typer can make a command of: one option per field of ``cls``.

    Args:
        cls: the settings.
        work: gets the checked settings, and the names of those that the user wrote.

    Returns:
        A function whose signature is the fields, ``--config`` and ``--debug``.
    """

    def run(**given: Any) -> None:
        config_file = given.pop("config")
        given.pop("debug")
        written: dict[str, Any] = {
            name: value for name, value in given.items() if value not in (None, [])
        }
        table: dict[str, Any] = {}
        if config_file is not None:
            table = read_config_file(config_file)
            # What is wrong in the file is said with the file's name, before the flags join in.
            _check_names(cls, table, str(config_file))
        config = build(cls, {**table, **written})
        work(config, {*table, *written})

    parameters = [_parameter(cls, spec) for spec in dataclasses.fields(cls)]
    parameters += [
        _option("config", Path | None, None, "--config"),
        _option("debug", bool, False, "--debug"),
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameter(cls: type, spec: dataclasses.Field[Any]) -> inspect.Parameter:
    """One option; absent on the command line it is None, so that a file can set it."""
    kind = field_type(cls, spec.name)
    names = flag(spec.name)
    if spec.metadata["argument"]:
        place = typer.Argument(metavar=spec.name.upper(), show_default=False)
        return _parameter_of(spec.name, kind | None, None, place)
    if spec.metadata["auto"]:
        kind = str
    if kind is bool:
        names = f"{names}/--no-{names.removeprefix('--')}"
    if spec.metadata["choices"]:
        kind = typing.Literal[spec.metadata["choices"]]
    repeatable = typing.get_origin(typing.get_type_hints(cls)[spec.name]) is tuple
    annotation: Any = list[kind] if repeatable else kind  # type: ignore[valid-type]
    return _option(spec.name, annotation | None, None, names)


def _option(name: str, annotation: Any, default: object, names: str) -> inspect.Parameter:
    return _parameter_of(name, annotation, default, typer.Option(names))


def _parameter_of(name: str, annotation: Any, default: object, place: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[annotation, place],
    )


def _check_names(cls: type[Config], table: dict[str, Any], source: str) -> None:
    """Raises what is wrong with the file itself; what is missing may still come as flags."""
    try:
        build(cls, table, source=source)
    except UsageError as error:
        problems = getattr(error, "problems", (error,))
        if any(problem.place.startswith(source) for problem in problems):
            raise
