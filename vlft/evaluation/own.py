"""A user's own metric: a Python file that is named on the command line, and runs as it is.

    HIGHER_IS_BETTER = True     # may be left out


    def score(reply, reference):  # two texts, as they stand in the result file
        return 1.0 if reply == reference else 0.0

No file of a model, a checkpoint or a data set can name one.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.errors import ConfigError, shown
from vlft.evaluation.metrics import METRICS, Metric, check_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

ENDING = ".py"


def find_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of these names or files; a file's metric is called as the file without ending.

    Raises:
        ConfigError: a library is missing, a file cannot be used, or two are called alike.
    """
    check_libraries([name for name in names if not name.endswith(ENDING)])
    found: dict[str, Metric] = {}
    for name in dict.fromkeys(names):
        called = name_of(name)
        if called in found:
            hint = "rename the file"
            raise ConfigError(f"two metrics are called {called}", place="--metric", hint=hint)
        found[called] = _own(Path(name)) if name.endswith(ENDING) else METRICS[name]
    return found


def name_of(metric: str) -> str:
    """What a metric is called: its name, or that of its file without ending."""
    return Path(metric).stem if metric.endswith(ENDING) else metric


def _own(path: Path) -> Metric:
    module = _imported(path)
    function = getattr(module, "score", None)
    if not callable(function):
        hint = "write score(reply, reference), which returns a number"
        raise ConfigError("has no function score", place=shown(path), hint=hint)
    return Metric(_checked(function, path), bool(getattr(module, "HIGHER_IS_BETTER", True)))


def _imported(path: Path) -> ModuleType:
    """The file as a module.

    Raises:
        ConfigError: there is no such file, or it fails.
    """
    spec = importlib.util.spec_from_file_location(f"vlft_metric_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError("no such file", place=shown(path), hint="name a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    with _failing(path):
        spec.loader.exec_module(module)
    return module


def _checked(function: Callable[[str, str], float], path: Path) -> Callable[[str, str], float]:
    """The function, whose results are finite numbers."""

    def score(reply: str, reference: str) -> float:
        with _failing(path):
            value = float(function(reply, reference))
        if not math.isfinite(value):
            hint = "return a finite number"
            raise ConfigError(f"score returned {value}", place=shown(path), hint=hint)
        return value

    return score


@contextmanager
def _failing(path: Path) -> Iterator[None]:
    """Says that the user's file has failed, which may raise anything."""
    try:
        yield
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        hint = "mend the file, it is your own"
        raise ConfigError(found, place=shown(path), hint=hint) from error
