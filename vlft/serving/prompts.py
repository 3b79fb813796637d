"""A request -> the prompt of a model, with its images as files of its own folder."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.data.conversation import Conversation, ImageRef, Turn
from vlft.data.download import ADDRESS, Limits, fetch_image
from vlft.data.images import inspect_image
from vlft.data.layouts.place import COMMON_TAG, place_in_text
from vlft.errors import DataError
from vlft.serving.problems import ApiError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor
    from vlft.serving.messages import Address, Message

DATA = re.compile(r"data:[\w.+-]*(?:/[\w.+-]*)?(?:;[\w=.+-]+)*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ImageLimits:
    """What the images of a request may cost.

    Attributes:
        count: of all images.
        size: bytes of a downloaded one.
        pixels: of an image.
        allow_private: whether addresses that are not public are connected to.
    """

    count: int
    size: int
    pixels: int
    allow_private: bool


def encode_messages(
    messages: Sequence[Message], processor: Processor, folder: Path, limits: ImageLimits
) -> EncodedSample:
    """The prompt of the messages, whose images are read from the folder from now on.

    Raises:
        ApiError: an image cannot be used, or the model has no form for such messages.
    """
    addresses = [address for message in messages for address in message.images]
    if len(addresses) > limits.count:
        found = f"{len(addresses)} images, at most {limits.count} are allowed"
        raise ApiError(400, found, place="messages", code="too_many_images")
    images = {
        address: _image(address, folder / str(number), processor, limits)
        for number, address in enumerate(addresses)
    }
    system = messages[0].text if messages[0].role == "system" else None
    turns = [_turn(m, images, processor) for m in messages if m.role != "system"]
    conversation = Conversation(tuple(turns), system)
    try:
        processor.encoder.check(conversation)
        prompt = processor.encode_conversation(conversation)
    except DataError as error:
        raise ApiError(400, error.message, place="messages", code="invalid_value") from None
    if len(prompt) >= processor.max_length:
        found = f"a prompt of {len(prompt)} tokens, less than {processor.max_length} are allowed"
        hint = "shorten the messages, or use fewer images"
        raise ApiError(400, found, place="messages", code="context_length_exceeded", hint=hint)
    return prompt


def _turn(message: Message, images: dict[Address, ImageRef], processor: Processor) -> Turn:
    """The turn of a message: its images where they stand, or at the tags of its text.

    DeepSeek-OCR's prompts have a new line after the tag, which a client can write in this way.
    """
    own = [images[address] for address in message.images]
    tags = (COMMON_TAG, processor.family.image_tag)
    if message.role == "assistant":
        return Turn("assistant", (message.text,))
    if own and any(tag in message.text for tag in tags):
        try:
            return place_in_text(message.text, own, processor.family.image_tag)
        except DataError as error:
            place = f"{message.place}.content"
            raise ApiError(400, error.message, place=place, code="invalid_value") from None
    parts: list[str | ImageRef] = []
    for part in message.parts:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        elif part != "":
            parts.append(part if isinstance(part, str) else images[part])
    return Turn("user", tuple(parts))


def _image(address: Address, path: Path, processor: Processor, limits: ImageLimits) -> ImageRef:
    """Downloads or decodes an image into a file, since the processor reads images from files.

    Raises:
        ApiError: it cannot be used.
    """
    url, place = address
    try:
        if DATA.match(url):
            path.write_bytes(_decoded(url))
        elif ADDRESS.match(url):
            of_download = Limits(size=limits.size, silence=10, total=30, attempts=2)
            fetch_image(url, path, allow_private=limits.allow_private, limits=of_download)
        else:
            raise DataError(
                f"found {url[:60]!r}, a data: URI in base64 or an http(s) address is needed"
            )
        facts = inspect_image(path, rotate=processor.pixels.rotate, most_pixels=limits.pixels)
    except DataError as error:
        raise ApiError(400, error.message, place=place, code="invalid_image") from None
    return ImageRef(path, "image", facts)


def _decoded(url: str) -> bytes:
    """The bytes of a data: URI."""
    text = url.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the image is not base64 ({error})") from None
