"""What a model family is: a frozen set of values and functions, no class to inherit from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, nn

    from vlft.families.keymap import KeyMap

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model are, as module names of the transformers class."""

    vision: str
    aligner: str
    language: str
    head: str


@dataclass(frozen=True)
class Pixels:
    """How pictures of one checkpoint become pixel values.

    Attributes:
        transform: RGB picture -> (3, H, W) float32.
        fingerprint: all numbers that the transform depends on.
    """

    transform: Callable[[Image], Tensor]
    fingerprint: str


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: of the family, its file and its template.
        title: for people.
        model_types: ``model_type`` in config.json -> the layout that it names.
        recognises: whether a config.json with such a model_type is of this family.
        template: file name under ``templates/``.
        image_tag: the family's own tag.
        roles: how the chat text names user and assistant.
        system_prompt: the default.
        parts: module names.
        attention_inputs: leaf names of the LLM's attention inputs (``qkv``).
        keys: tensor names of both layouts.
        model_class: name of the class in transformers.
        native_config: config.json of the authors' layout -> keyword arguments of the class's
            config; refuses what the class cannot hold.
        clean_config: config.json of transformers' layout -> the same, known fields only.
        original_config: those keyword arguments and a dtype -> config.json of the authors' layout.
        processor_classes: transformers' names of processor and image processor, for export.
        pixels: model folder -> picture transform.
        image_tokens: keyword arguments of the config -> tokens per picture.
        encode_images: (model, pixels (I, 3, H, W)) -> features (I, T, D).
    """

    name: str
    title: str
    model_types: Mapping[str, str]
    recognises: Callable[[Config], bool]
    template: str
    image_tag: str
    roles: tuple[str, str]
    system_prompt: str
    parts: Parts
    attention_inputs: tuple[str, ...]
    keys: KeyMap
    model_class: str
    native_config: Callable[[Config, int], dict[str, Any]]
    clean_config: Callable[[Config, int], dict[str, Any]]
    original_config: Callable[[Config, str], dict[str, Any]]
    processor_classes: tuple[str, str]
    pixels: Callable[[Path, Config], Pixels]
    image_tokens: Callable[[Config], int]
    encode_images: Callable[[nn.Module, Tensor], Tensor]
