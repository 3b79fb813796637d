"""Every setting, once: its name, default, help and limits, in a file for each group of commands.

The flags of the command line, the keys of ``--config FILE``, the saved ``run_config.json`` and the
Python API are all made from these dataclasses. A file is imported at the first use of a name of it,
so that no command waits for the settings of the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlft.config.data import CheckConfig, DataConfig
    from vlft.config.drawing import DrawConfig
    from vlft.config.evaluation import METRIC_NAMES, EvalConfig
    from vlft.config.inference import InferConfig
    from vlft.config.models import (
        CacheConfig,
        ConvertConfig,
        DemoConfig,
        EnvConfig,
        MergeLoraConfig,
        ModelsConfig,
        ReportConfig,
    )
    from vlft.config.serving import ServeConfig
    from vlft.config.shared import PANELS, ReadingSettings
    from vlft.config.sharing import PushConfig
    from vlft.config.training import (
        INIT_LORA,
        JOINED_TOKENS,
        LEARNING_RATES,
        NEEDS_WHOLE_WEIGHTS,
        TOKENS_PER_ROW,
        PlanConfig,
        SftConfig,
    )

__all__ = [
    "INIT_LORA",
    "JOINED_TOKENS",
    "LEARNING_RATES",
    "METRIC_NAMES",
    "NEEDS_WHOLE_WEIGHTS",
    "PANELS",
    "TOKENS_PER_ROW",
    "CacheConfig",
    "CheckConfig",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "DrawConfig",
    "EnvConfig",
    "EvalConfig",
    "InferConfig",
    "MergeLoraConfig",
    "ModelsConfig",
    "PlanConfig",
    "PushConfig",
    "ReadingSettings",
    "ReportConfig",
    "ServeConfig",
    "SftConfig",
]

_HOMES = {
    "data": ("CheckConfig", "DataConfig"),
    "drawing": ("DrawConfig",),
    "evaluation": ("METRIC_NAMES", "EvalConfig"),
    "inference": ("InferConfig",),
    "models": (
        "CacheConfig",
        "ConvertConfig",
        "DemoConfig",
        "EnvConfig",
        "MergeLoraConfig",
        "ModelsConfig",
        "ReportConfig",
    ),
    "serving": ("ServeConfig",),
    "shared": ("PANELS", "ReadingSettings"),
    "sharing": ("PushConfig",),
}


def __getattr__(name: str) -> object:
    """A name of one of the files, imported at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'vlft.config' has no attribute {name!r}")
    home = next((file for file, names in _HOMES.items() if name in names), "training")
    return getattr(importlib.import_module(f"vlft.config.{home}"), name)
