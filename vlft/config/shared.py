"""What the settings of several commands have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.settings import Rule, Settings, given, setting

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZE = ("none", "nf4", "int8")
ATTENTION = ("auto", "sdpa", "eager")
LAYOUTS = ("auto", "messages", "list", "completion", "query")
IMAGE_MODES = ("tiny", "small", "base", "large", "gundam")
HUBS = ("huggingface", "modelscope")
EXIF = ("auto", "rotate")

# The panels of --help, in order.
PANELS = (
    "Model", "Serving", "Scoring", "Data", "Reading", "Tuning", "Optimisation", "Run",
    "Generation", "Output",
)  # fmt: skip


def makers(*panels: str) -> list[Callable[..., Any]]:
    """``setting`` for each of some panels of --help."""
    return [partial(setting, panel=panel) for panel in panels]


_data, _reading = makers("Data", "Reading")


def image_mode_setting(default: str) -> Any:
    """The views of a page; ``default`` is what --help says of it, as in the next two."""
    return _data(
        None,
        "How a page becomes views, for DeepSeek-OCR, and small, base, gundam for DeepSeek-OCR-2.",
        choices=IMAGE_MODES,
        default_text=default,
    )


def max_tiles_setting(default: str) -> Any:
    """The bound on the tiles of an image."""
    return _data(
        None,
        "Most tiles of an image, for DeepSeek-VL2 and DeepSeek-OCR.",
        minimum=1,
        default_text=default,
    )


def max_image_tokens_setting(default: str) -> Any:
    """The bound on the tokens of an image."""
    return _data(
        None,
        "Most tokens of an image, for DeepSeek-VL2 and DeepSeek-OCR.",
        minimum=1,
        default_text=default,
    )


def special_tokens_setting(default: str | None) -> Any:
    """What special tokens in data become; no default stands for the run's."""
    return _data(
        default,
        "Special tokens that data writes, as <|User|>. text: plain text; keep: tokens, as in the "
        "authors' code.",
        choices=("text", "keep"),
        default_text="text" if default else "as in training",
    )


def hub_rules(config: Any, model: str | None) -> tuple[Rule, Rule]:
    """The rules of what says where on a hub a model is, if no hub is asked for the model."""
    is_local = model is None or Path(model).is_dir()
    found = "only for a hub id, found a folder or no model"
    return (
        (is_local and config.revision, "--revision", found, "leave it out, or name a hub id"),
        (is_local, given(config, "hub"), found, None),
    )


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class ReadingSettings(Settings):
    """How data files are read, for all commands that read them."""

    layout: str = _reading("auto", "Layout of the records.", choices=LAYOUTS)
    columns: tuple[str, ...] = _reading(
        (), "Columns by what they are, e.g. response=label,images=photo. Left of = stand "
        "messages, query, response, images, system or history.", default_text="the usual names")
    prompt: str | None = _reading(None, "Question of records without one, e.g. captions.")
    answers: str | None = _reading(
        None, "Which of several reference answers is the reply.", choices=("first", "most", "each"),
        default_text="asked")
    preference: str | None = _reading(
        None, "Which reply of a preference pair is the reply.", choices=("chosen",),
        default_text="asked")
    objects: str | None = _reading(
        None, "What becomes of boxes that no tag in the texts places: they are the reply, or are "
        "dropped.", choices=("reply", "drop"), default_text="asked")
    qa: str = _reading("turns", "Whether the questions of a record are turns of one dialogue or "
                       "samples of their own.", choices=("turns", "samples"))
