"""Text and pixels of one checkpoint: rows -> encoded samples -> batches, and token ids -> text."""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlft.data.boxes import write_boxes
from vlft.data.drawing import encode_sample
from vlft.data.encode import IGNORE, ChatFormat, EncodedImage, EncodedSample, facts_of
from vlft.data.encoder import ChatEncoder
from vlft.data.images import decoded
from vlft.data.options import Reading, reading_of
from vlft.data.read import read_row
from vlft.data.special_tokens import SpecialTokens
from vlft.errors import CheckpointError, shown
from vlft.families.base import PROCESSOR_FILE
from vlft.families.ocr_config import WINDOWED
from vlft.families.pixels import stated_exif
from vlft.families.schemas import PROCESSOR
from vlft.families.tokenizer import (
    add_tokens,
    check_token_ids,
    load_tokenizer,
    special_tokens,
    token_id,
)
from vlft.files import read_object_if_there

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tokenizers import Tokenizer
    from torch import Tensor

    from vlft.data.conversation import Conversation
    from vlft.families.base import Family, Pixels, Views


@dataclass(frozen=True)
class Processor:
    """Rows to token ids, images to model inputs, and token ids to text, for one checkpoint.

    Attributes:
        chat: how conversations become token ids.
        pixels: how images become pixel values.
        max_length: the model's context length, in tokens.
    """

    family: Family
    chat: ChatFormat
    pixels: Pixels
    max_length: int

    def encode(self, row: Mapping[str, Any], image_root: str | Path | None = None) -> EncodedSample:
        """A row of the native layout as ids and labels.

        Args:
            row: ``query`` and, as needed, ``response``, ``history``, ``images``, ``system``.
                Without ``response`` the sample is a prompt, ready for generation.
            image_root: folder of relative image paths; the working folder if None.

        Raises:
            DataError: a field or an image cannot be used.
        """
        reading = Reading(self.family.image_tag, False, self.family.has_boxes)
        conversation = read_row(row, reading, Path(image_root or "."))
        place = conversation.place
        known = {ref: facts_of(ref, self.chat, place) for ref in conversation.images}
        return self.encode_conversation(
            write_boxes(conversation.map_images(lambda ref: replace(ref, facts=known[ref])))
        )

    def reading(self, settings: Any, *, need_response: bool = True) -> Reading:
        """How the settings of a command say that records are read for this family.

        Raises:
            ConfigError: ``--columns`` names no role.
        """
        family = self.family
        return reading_of(
            settings, family.image_tag, has_boxes=family.has_boxes, need_response=need_response
        )

    @functools.cached_property
    def encoder(self) -> ChatEncoder:
        """What a data set needs of this processor."""
        return ChatEncoder(self.chat)

    def encode_conversation(self, conversation: Conversation) -> EncodedSample:
        """A conversation as ids and labels."""
        return encode_sample(conversation, self.chat)

    def with_special_tokens(self, special_tokens: str) -> Processor:
        """The processor with special tokens in data as plain ``text``, or as tokens (``keep``)."""
        chat, as_text = self.chat, special_tokens == "text"
        special = (chat.special or SpecialTokens(chat.tokenizer)) if as_text else None
        return replace(self, chat=replace(chat, special=special))

    def pixel_values(self, images: Sequence[EncodedImage], *, verify: bool = False) -> list[Views]:
        """The views of each image, as the authors' processor makes them.

        Raises:
            DataError: a file cannot be decoded or, if ``verify``, changed since it was checked.
        """
        found = []
        for image in images:
            digest = image.digest if verify else None
            with decoded(image.path, digest=digest, rotate=self.pixels.rotate) as rgb:
                found.append(self.pixels.transform(rgb, image.tiles))
        return found

    def image_inputs(self, images: Sequence[EncodedImage]) -> dict[str, Any]:
        """The keyword arguments of the model for I images; empty if there is none."""
        if not images:
            return {}
        return self.pixels.inputs(self.pixel_values(images), [image.tiles for image in images])

    def collate(self, samples: Sequence[EncodedSample]) -> dict[str, Any]:
        """A left-padded batch of B samples, as the model's class takes it.

        It has what ``padded`` returns, and the inputs of all images.
        """
        images = [image for sample in samples for image in sample.images]
        return {**self.padded(samples), **self.image_inputs(images)}

    def padded(self, samples: Sequence[EncodedSample]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels of B samples: (B, T) int64, padded on the left."""
        length = max(len(sample) for sample in samples)
        batch = {
            "input_ids": torch.full((len(samples), length), self.chat.pad_id),
            "attention_mask": torch.zeros(len(samples), length, dtype=torch.int64),
            "labels": torch.full((len(samples), length), IGNORE),
        }
        for row, sample in enumerate(samples):
            start = length - len(sample)
            batch["input_ids"][row, start:] = sample.input_ids
            batch["attention_mask"][row, start:] = 1
            batch["labels"][row, start:] = sample.labels
        return batch

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a reply, stripped; special tokens only if the family's replies have some."""
        return self.reply_text(token_ids).strip()

    def reply_text(self, token_ids: Sequence[int]) -> str:
        """The text of a reply as it is, without begin, end and padding tokens."""
        dropped = (self.chat.bos_id, self.chat.eos_id, self.chat.pad_id)
        ids = [token for token in token_ids if token not in dropped]
        return self.text(ids, special=self.family.has_boxes)

    def text(self, token_ids: Sequence[int], *, special: bool = True) -> str:
        """The text of any tokens; that of special ones only if ``special``.

        Added tokens that are not special are put in as they are. The byte-level decoder would take
        the letters among them, like DeepSeek-LLM's ü, for the bytes that these letters stand for.
        """
        decode = self.chat.tokenizer.decode
        return "".join(
            literal * len(ids) if literal else decode(ids, skip_special_tokens=not special)
            for literal, group in itertools.groupby(token_ids, self._literals.get)
            if (ids := list(group))
        )

    @functools.cached_property
    def _literals(self) -> dict[int, str]:
        """Texts of the added tokens that are not special, by id."""
        added = self.chat.tokenizer.get_added_tokens_decoder().items()
        return {token_id: token.content for token_id, token in added if not token.special}


def load_processor(
    folder: Path,
    family: Family,
    config: Mapping[str, Any],
    roles: tuple[str, str] | None = None,
) -> Processor:
    """The processor of a model folder, which holds the tokenizer and this config.json.

    ``roles``, if given, are used in place of those of the folder.

    Raises:
        CheckpointError: a file is missing or contradicts another.
    """
    tokenizer = load_tokenizer(folder)
    names = special_tokens(folder)
    add_tokens(tokenizer, family, names)
    image_token_id = token_id(tokenizer, family.image_tag, "the image tag", folder)
    with config_errors(folder, family):
        native = family.native_config(config, image_token_id)
        pixels = family.pixels(folder, config, native)
        check_token_ids(folder, tokenizer, int(native["text_config"]["vocab_size"]))
    pixels = replace(pixels, rotate=pixels.rotate or stated_exif(folder))
    _check_image_tokens(folder, pixels.tokens)
    eos_token = names.get("eos_token", "")
    chat = ChatFormat(
        write=family.chat_text,
        template=template_source(family.template) if family.template else "",
        tokenizer=tokenizer,
        roles=roles or _roles(folder, family, config),
        system_prompt=family.system_prompt,
        image_tag=family.image_tag,
        image_token_id=image_token_id,
        image_border=_border(tokenizer, family, folder),
        view=pixels.view,
        rotate=pixels.rotate,
        bos_id=token_id(tokenizer, names.get("bos_token"), "bos_token", folder),
        eos_token=eos_token,
        eos_id=token_id(tokenizer, eos_token, "eos_token", folder),
        pad_id=token_id(tokenizer, names.get("pad_token") or eos_token, "pad_token", folder),
        ngram_exempt=tuple(token_id(tokenizer, t, t, folder) for t in family.ngram_exempt),
        draws=family.generator is not None,
        special=SpecialTokens(tokenizer),
        window=_window(native["text_config"]),
        check=family.check_form,
    )
    return Processor(family, chat, pixels, int(native["text_config"]["max_position_embeddings"]))


def _border(
    tokenizer: Tokenizer, family: Family, folder: Path
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids before and after the tokens of an image."""
    ids = [token_id(tokenizer, tag, tag, folder) for tag in family.image_border or ()]
    return tuple(ids[:1]), tuple(ids[1:])


def _window(text: Mapping[str, Any]) -> int | None:
    """The window of the replies that the config of an LLM's class states."""
    windowed = WINDOWED in text.get("layer_types", ())
    return int(text["sliding_window"]) if windowed else None


def _roles(folder: Path, family: Family, config: Mapping[str, Any]) -> tuple[str, str]:
    names, found = family.roles(folder, config)
    if names is None:
        raise CheckpointError(
            f"the names of user and assistant in the chat text are not known: {found}",
            place=shown(folder),
            hint=f"vlft convert {shown(folder)} NEW --model-roles words (User, Assistant, as "
            "Janus-1.3B) or tokens (<|User|>, <|Assistant|>, as Janus-Pro) states them in NEW",
        )
    return names


@contextmanager
def config_errors(folder: Path, family: Family) -> Iterator[None]:
    """Turns the errors of a malformed configuration into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError as error:
        place = error.place or shown(folder / "config.json")
        raise CheckpointError(error.message, place=place, hint=error.hint) from None
    except KeyError as error:
        raise CheckpointError(
            f"{error} is missing, or not known for {family.title}",
            place=shown(folder / "config.json"),
            hint="download the model again",
        ) from None
    except (
        ArithmeticError,
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"incomplete or malformed for {family.title}: {str(error).splitlines()[0]}",
            place=shown(folder / "config.json"),
            hint="download the model again",
        ) from None


def template_source(name: str) -> str:
    """The text of a chat template, from the installed package or the root of the repository."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / name).is_file():
            return (folder / name).read_text("utf-8")
    raise CheckpointError(f"template {name} is missing from the installation", place=str(package))


def _check_image_tokens(folder: Path, image_tokens: int | None) -> None:
    path = folder / PROCESSOR_FILE
    stated = read_object_if_there(path, PROCESSOR).get("num_image_tokens")
    if image_tokens is not None and stated not in (None, image_tokens):
        raise CheckpointError(
            f"num_image_tokens is {stated}, the vision tower gives {image_tokens}",
            place=shown(path),
            hint="use the config.json and processor_config.json of one model",
        )
