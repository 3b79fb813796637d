"""What a model family is: a frozen set of values and functions, no class to inherit from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, nn

    from vlft.data.encode import View
    from vlft.families.keymap import KeyMap

Config = Mapping[str, Any]
Tiles = tuple[int, int]


@dataclass(frozen=True)
class Parts:
    """Where the parts of a model are, as names of modules or parameters of its class.

    Attributes:
        vision: the towers.
        aligner: what turns their features into the LLM's.
        language: the LLM.
        head: its vocabulary projection.
        other: parts that take no part in understanding; kept as they are.
    """

    vision: tuple[str, ...]
    aligner: tuple[str, ...]
    language: str
    head: str
    other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pixels:
    """How images of one checkpoint become a model's inputs.

    Attributes:
        tokens: of an image; None where it depends on the image.
        size: pixels of a side of a view.
        view: ((width, height) of an image, number of images in its conversation) -> its View.
        transform: (RGB image, its tiles) -> (V, 3, H, W) float32, V views of it, as the authors'
            processor makes them.
        inputs: (all views of I images (V, 3, H, W), tiles of each image) -> the keyword
            arguments of the model.
        fingerprint: all numbers that the above depend on.
    """

    tokens: int | None
    size: int
    view: Callable[[tuple[int, int], int], View]
    transform: Callable[[Image, Tiles], Tensor]
    inputs: Callable[[Tensor, Sequence[Tiles]], dict[str, Tensor]]
    fingerprint: str


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: of the family and its file.
        title: for people.
        model_types: ``model_type`` in config.json -> the layout that it names.
        recognises: whether a config.json with such a model_type is of this family.
        template: file name under ``templates/``.
        image_tag: the family's own tag.
        added_tokens: special tokens that a tokenizer gets, in this order, if it lacks them.
        image_border: tokens before and after each image's.
        apart: whether messages are tokenised one by one instead of as one text.
        speaks_tokens: whether special tokens are part of replies, as those of grounding are.
        kept_dtypes: ends of the names of tensors that stay in the dtype of their file.
        roles: (model folder, its config.json) -> how the chat text names user and assistant.
        system_prompt: the default.
        parts: see Parts.
        attention_inputs: leaf names of the LLM's attention inputs (``qkv``).
        keys: tensor names of both layouts.
        model_class: the class, imported when called.
        native_config: config.json of the authors' layout, image token id -> keyword arguments of
            the class's config; refuses what the class cannot hold.
        clean_config: config.json of transformers' layout -> the same, known fields only; None
            where transformers has no class, hence no layout.
        original_config: those keyword arguments and a dtype -> config.json of the authors' layout;
            None where there is one layout, whose files are copied.
        pixels: (model folder, its config.json, keyword arguments of the config) -> Pixels.
        processor_files: (model folder, its config.json, the keyword arguments, layout) ->
            preprocessor_config.json and processor_config.json of that layout; None likewise.
        see: (model, inputs of I images) -> (V, T, W), what the towers make of their V views.
        align: (model, that, tiles of each image) -> (R, D) features that replace the image
            tokens, those of all images laid end to end.
    """

    name: str
    title: str
    model_types: Mapping[str, str]
    recognises: Callable[[Config], bool]
    template: str
    image_tag: str
    system_prompt: str
    parts: Parts
    attention_inputs: tuple[str, ...]
    keys: KeyMap
    model_class: Callable[[], Any]
    native_config: Callable[[Config, int], dict[str, Any]]
    clean_config: Callable[[Config, int], dict[str, Any]] | None
    original_config: Callable[[Config, str], dict[str, Any]] | None
    pixels: Callable[[Path, Config, Config], Pixels]
    processor_files: (
        Callable[[Path, Config, Config, str], tuple[dict[str, Any], dict[str, Any]]] | None
    )
    see: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    align: Callable[[nn.Module, Tensor, Sequence[Tiles]], Tensor]
    roles: Callable[[Path, Config], tuple[str, str]] = lambda _folder, _config: (
        "User",
        "Assistant",
    )
    added_tokens: tuple[str, ...] = ()
    image_border: tuple[str, str] | None = None
    apart: bool = False
    speaks_tokens: bool = False
    kept_dtypes: tuple[str, ...] = ()


def is_in(name: str, parts: Sequence[str]) -> bool:
    """Whether a module or parameter name is one of the parts, or within one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def keeps_dtype(name: str, family: Family) -> bool:
    """Whether a tensor stays in the dtype of its file, whatever the model's."""
    return name.endswith(family.kept_dtypes)


def encode_images(
    family: Family, model: nn.Module, inputs: Mapping[str, Tensor], tiles: Sequence[Tiles]
) -> Tensor:
    """(R, D) features of I images, laid end to end."""
    return family.align(model, family.see(model, inputs), tiles)


def from_transformers(name: str) -> Callable[[], Any]:
    """A class of transformers, imported when called."""

    def find() -> Any:
        import transformers

        return getattr(transformers, name)

    return find
