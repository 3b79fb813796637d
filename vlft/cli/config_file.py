"""``--config FILE``: the settings in a JSON or YAML file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vlft.errors import ConfigError
from vlft.files import open_regular
from vlft.settings import IN_WORDS

if TYPE_CHECKING:
    from pathlib import Path


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a JSON or YAML file, with underscores in the keys as in fields.

    Raises:
        ConfigError: the file is missing or is not a table of settings.
    """
    kind, example = "YAML", 'a line "model: ..." and a line "dataset: train.jsonl"'
    if path.suffix == ".json":
        kind, example = "JSON", '{"model": "...", "dataset": ["train.jsonl"]}'
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        found = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        if isinstance(error, UnicodeDecodeError):
            found = f"not UTF-8 (byte {error.start})"
        raise ConfigError(found, place=str(path), hint="name a JSON or YAML file") from None
    try:
        table = json.loads(text) if kind == "JSON" else _load_yaml(text)
    except (ValueError, RecursionError) as error:
        found = f"not {kind}: {_one_line(error)}"
    else:
        if isinstance(table, dict):
            return {str(key).lstrip("-").replace("-", "_"): v for key, v in table.items()}
        found = f"found {IN_WORDS.get(type(table), type(table).__name__)}"
        found += ", a table of settings is allowed"
    raise ConfigError(found, place=str(path), hint=f"write e.g. {example}")


def _load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: not YAML; the message is one line.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _one_line(error: ValueError | RecursionError) -> str:
    """A parser's message in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at line {error.lineno}, column {error.colno}"
    return "too deeply nested" if isinstance(error, RecursionError) else str(error).split("\n")[0]
