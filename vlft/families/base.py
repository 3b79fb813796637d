"""The description of a model family: values and functions, no class to inherit from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

from vlft.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, nn

    from vlft.data.conversation import Conversation
    from vlft.data.encode import ChatFormat, ChatText, Tiles
    from vlft.families.keymap import KeyMap

Config = Mapping[str, Any]
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
# The contents of small JSON files by their names.
Files = Mapping[str, Mapping[str, Any]]
# The views of an image, those of equal size together: (V, 3, H, W) float32 for each size. The
# whole image comes first.
Views = tuple["Tensor", ...]


class Roles(NamedTuple):
    """How the chat text names user and assistant.

    Attributes:
        names: None if the files do not say.
        source: where the names were found, unless a chat template states them; without names, what
            was found.
    """

    names: tuple[str, str] | None
    source: str = ""


@dataclass(frozen=True)
class Parts:
    """Names of the modules, or parameters, of the model's class that make up each part.

    Attributes:
        aligner: projection of their features to the LLM's hidden size.
        head: vocabulary projection (lm_head).
        other: not used for understanding images; loaded and exported unchanged.
    """

    vision: tuple[str, ...]
    aligner: tuple[str, ...]
    language: str = "model.language_model"
    head: str = "lm_head"
    other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pixels:
    """How images become inputs of the model of one checkpoint.

    Attributes:
        tokens: number of image tokens per image; None where it depends on the image.
        view: ((width, height) of an image, number of images in its conversation) -> (number of its
            tokens, its tiles).
        sizes: tiles of an image -> (number, height and width in pixels) of its views of each size.
        rows: tiles of an image -> length of the first axis of its tower features.
        transform: (RGB image, its tiles) -> its views, with the pixel values of the authors'
            processor.
        inputs: (views of each of I images, tiles of each) -> keyword arguments of the model.
        fingerprint: text that differs if any setting of the above does.
        limit: (most tiles, most tokens of an image) -> Pixels that keep to them. Raises ConfigError
            if no image can. None for a family without tiles.
        stated: file -> entries of it that say so in a merged model.
        modes: names of the ways in which an image becomes views; empty if there is one.
        in_mode: name -> Pixels in this mode; None if there is one.
        rotate: whether an image is turned by its EXIF orientation when it is opened.
        files: layout -> its files about images and their contents; empty for a family with one
            layout, where they are copied.
    """

    tokens: int | None
    view: Callable[[tuple[int, int], int], tuple[int, Tiles]]
    sizes: Callable[[Tiles], tuple[tuple[int, int], ...]]
    rows: Callable[[Tiles], int]
    transform: Callable[[Image, Tiles], Views]
    inputs: Callable[[Sequence[Views], Sequence[Tiles]], dict[str, Any]]
    fingerprint: str
    rotate: bool = False
    files: Mapping[str, Files] = field(default_factory=dict)
    limit: Callable[[int | None, int | None], Pixels] | None = None
    stated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modes: tuple[str, ...] = ()
    in_mode: Callable[[str], Pixels] | None = None


@dataclass(frozen=True)
class ImageGenerator:
    """How a model draws: the LLM predicts the codes of an image, one after another.

    Legend: K codes of an image, as many as ``Pixels.tokens``; D width of the LLM, H W pixels.

    Attributes:
        embed: (model, codes (..., T) int64) -> (..., T, D), their input embeddings.
        head: name of the module that maps last hidden states (..., D) to scores of codes.
        aligner: name of the module that maps embeddings of codes to the LLM's width.
        coder: name of the module that ``decode`` and ``encode`` use; it is never trained.
        decode: (model, codes (I, K)) -> (I, 3, H, W) float32 from -1, black, to 1, white.
        encode: (model, (I, 3, H, W) pixel values as for the vision tower) -> (I, K) int64.
    """

    embed: Callable[[nn.Module, Tensor], Tensor]
    head: str
    aligner: str
    coder: str
    decode: Callable[[nn.Module, Tensor], Tensor]
    encode: Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: of the family and its file.
        title: name shown to the user.
        model_types: ``model_type`` in config.json -> layout, original or transformers.
        matches: whether a config.json of the authors' layout with one of these model_types is of
            this family. It must be true of no other family's.
        matches_native: likewise of transformers' layout; for families that share a class.
        class_name: of the model, as ``module:class``.
        chat_text: (conversation, chat format) -> its text, see families.chat_text.
        template: chat template, a file name under ``templates/``; None if the text has no roles.
        image_tag: stands for an image in the chat text.
        system_prompt: used by conversations that have none.
        keys: tensor names of both layouts.
        native_config: (config.json of either layout, image token id) -> keyword arguments of the
            class's config; unknown fields are dropped. Raises CheckpointError for what the class
            does not support.
        pixels: (model folder, its config.json, keyword arguments of the config) -> Pixels.
        vision_features: (model, inputs of I images) -> (R, ..., W), tower features of their views,
            image after image; see Pixels.rows.
        align: (model, those features, tiles of each image) -> (R, D), the features that replace
            the image tokens, all images end to end.
        original_config: (keyword arguments of the config, dtype, preprocessor_config.json of
            transformers' layout) -> config.json of the authors' layout; None if transformers has
            no class, so that this layout is the only one.
        roles: (model folder, its config.json) -> names of user and assistant in the chat text.
        roles_by_kind: the names that ``vlft convert --model-roles`` may state; empty if fixed.
        attention_inputs: leaf names of the LLM's attention inputs, the LoRA target ``qkv``.
        added_tokens: special tokens added, in this order, to a tokenizer without them.
        image_border: tokens before and after the tokens of each image.
        tokenize_per_message: whether each message is tokenised on its own instead of the chat text
            as a whole.
        has_boxes: whether its text has tags for boxes, see data.boxes; decoded replies keep
            special tokens then.
        max_new_tokens: longest reply, in tokens, unless the user asks for another.
        no_repeat_ngram: tokens of a sequence that may not occur twice, likewise; 0 for none.
        ngram_window: last tokens of the reply within which alone none may, unless the user asks for
            another number; None for the whole sequence.
        ngram_exempt: tokens that are never banned for it within a window.
        stops_loops: whether a reply that repeats itself without end is stopped.
        keep_dtype_suffixes: tensors with these name endings are never cast.
        check_form: see ``ChatFormat.check``.
        several_images: whether its plain prompts may hold several images.
        generator: how its models draw; None if they do not.
    """

    name: str
    title: str
    model_types: Mapping[str, str]
    matches: Callable[[Config], bool]
    class_name: str
    chat_text: Callable[[Conversation, ChatFormat], ChatText]
    template: str | None
    image_tag: str
    system_prompt: str
    parts: Parts
    keys: KeyMap
    native_config: Callable[[Config, int], dict[str, Any]]
    pixels: Callable[[Path, Config, Config], Pixels]
    vision_features: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    align: Callable[[nn.Module, Tensor, Sequence[Tiles]], Tensor]
    original_config: Callable[[Config, str, Config], dict[str, Any]] | None = None
    roles: Callable[[Path, Config], Roles] = lambda *_: Roles(("User", "Assistant"))
    roles_by_kind: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    attention_inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    added_tokens: tuple[str, ...] = ()
    image_border: tuple[str, str] | None = None
    has_boxes: bool = False
    max_new_tokens: int = 512
    no_repeat_ngram: int = 0
    ngram_window: int | None = None
    ngram_exempt: tuple[str, ...] = ()
    stops_loops: bool = False
    keep_dtype_suffixes: tuple[str, ...] = ()
    check_form: Callable[[Conversation], None] | None = None
    several_images: bool = False
    generator: ImageGenerator | None = None
    matches_native: Callable[[Config], bool] = lambda _: True

    @property
    def has_transformers_layout(self) -> bool:
        """Whether models can be converted to transformers' layout."""
        return self.original_config is not None

    def model_class(self) -> Any:
        """The class of the model, imported by this call."""
        return resolve_name(self.class_name)


def is_in(name: str, parts: Sequence[str]) -> bool:
    """Whether a module or parameter name is one of the parts, or within one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def keeps_dtype(name: str, family: Family) -> bool:
    """Whether a tensor stays in the dtype of its file, whatever the dtype of the model."""
    return name.endswith(family.keep_dtype_suffixes)


def encode_images(
    family: Family, model: nn.Module, inputs: Mapping[str, Any], tiles: Sequence[Tiles]
) -> Tensor:
    """(R, D) features of I images, end to end."""
    return family.align(model, family.vision_features(model, inputs), tiles)


def known_fields(config: Config, fields: Config) -> dict[str, Any]:
    """The given fields of a config, or their defaults; null counts as absent.

    Fields that are absent and have the default None are left out.
    """
    stated = {key: value for key, value in config.items() if value is not None}
    values = {key: stated.get(key, default) for key, default in fields.items()}
    return {key: value for key, value in values.items() if value is not None}


def sizes_by_name(params: Config, sizes: Mapping[str, Config], default: str) -> dict[str, Any]:
    """The sizes that the authors' code looks up by model_name; ``params`` may override each.

    Raises:
        CheckpointError: the model_name is unknown.
    """
    name = params.get("model_name") or default
    if name not in sizes:
        raise CheckpointError(
            f"unknown vision model_name {name!r}", hint=f"allowed: {', '.join(sizes)}"
        )
    return known_fields(params, sizes[name])
