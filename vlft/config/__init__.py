"""Every setting, once: its name, default, help and limits, in a file for each group of commands.

The flags of the command line, the keys of ``--config FILE``, the saved ``run_config.json`` and the
Python API are all made from these dataclasses.
"""

from vlft.config.data import CheckConfig, DataConfig
from vlft.config.drawing import DrawConfig
from vlft.config.evaluation import METRIC_NAMES, EvalConfig
from vlft.config.inference import InferConfig
from vlft.config.models import CacheConfig, ConvertConfig, EnvConfig, MergeLoraConfig, ModelsConfig
from vlft.config.shared import PANELS, ReadingSettings
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
    "DrawConfig",
    "EnvConfig",
    "EvalConfig",
    "InferConfig",
    "MergeLoraConfig",
    "ModelsConfig",
    "PlanConfig",
    "ReadingSettings",
    "SftConfig",
]
