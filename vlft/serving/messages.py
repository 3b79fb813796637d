"""The messages of a request -> roles, texts and images, in the order they are read.

{"role": "user", "content": [{"type": "text", "text": "What is this?"},
                             {"type": "image_url", "image_url": {"url": "data:image/png;..."}}]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vlft.errors import LONE_SURROGATE
from vlft.serving.problems import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields beside role and content that clients send back as they got them.
EMPTY = ("refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content")
DETAILS = ("auto", "low", "high")


class Address(NamedTuple):
    """Where an image is: a data: URI or a web address, and the field that says so."""

    url: str
    place: str


@dataclass(frozen=True)
class Message:
    """A message; ``role`` is system, user or assistant."""

    role: str
    parts: tuple[str | Address, ...]
    place: str

    @property
    def text(self) -> str:
        """Its texts, one after the other."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Address, ...]:
        """Its images."""
        return tuple(part for part in self.parts if isinstance(part, Address))


def read_messages(value: Any) -> tuple[Message, ...]:
    """The messages: a system prompt or none, then user and assistant in turn, at last the user.

    Raises:
        ApiError: they are not of this form.
    """
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list with a message is needed")
    messages = tuple(_message(item, f"messages[{n}]") for n, item in enumerate(value))
    turns = messages[messages[0].role == "system" :]
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            found = f"found {message.role}, {expected} is needed here"
            hint = "a system prompt comes first; then user and assistant take turns"
            raise ApiError(
                400, found, place=f"{message.place}.role", code="invalid_value", hint=hint
            )
    if not turns or turns[-1].role != "user":
        raise _wrong(messages[-1].place, "the last message must be the user's")
    return messages


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise _wrong(place, "an object is needed")
    role = value.get("role")
    if role not in ROLES:
        raise _wrong(f"{place}.role", f"one of {', '.join(ROLES)} is needed")
    for name, field in value.items():
        if name in ("role", "content") or (name in EMPTY and not field) or field is None:
            continue
        raise ApiError(
            400,
            "a field that is not supported",
            place=f"{place}.{name}",
            code="unsupported_parameter",
        )
    parts = _parts(value.get("content"), f"{place}.content")
    message = Message(ROLES[role], parts, place)
    if message.role != "user" and message.images:
        raise _wrong(message.images[0].place, "images belong into the messages of the user")
    if message.role == "user" and not any(parts):
        raise _wrong(f"{place}.content", "a text or an image is needed")
    return message


def _parts(content: Any, place: str) -> tuple[str | Address, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (_text(content, place),)
    if not isinstance(content, list):
        raise _wrong(place, "a text or a list of parts is needed")
    return tuple(_part(part, f"{place}[{number}]") for number, part in enumerate(content))


def _part(part: Any, place: str) -> str | Address:
    if not isinstance(part, dict):
        raise _wrong(place, "an object is needed")
    kind = part.get("type")
    if kind not in ("text", "image_url"):
        raise _wrong(f"{place}.type", "text or image_url is allowed")
    _check_fields(part, ("type", kind), place)
    if kind == "text":
        return _text(part.get("text"), f"{place}.text")
    place = f"{place}.image_url"
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise _wrong(place, 'an object with "url" is needed')
    _check_fields(image, ("url", "detail"), place)
    if image.get("detail") not in (None, *DETAILS):
        raise _wrong(f"{place}.detail", f"one of {', '.join(DETAILS)} is allowed")
    return Address(image["url"], f"{place}.url")


def _check_fields(value: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    unknown = next((n for n, field in value.items() if n not in known and field is not None), None)
    if unknown is not None:
        found = "a field that is not supported"
        raise ApiError(400, found, place=f"{place}.{unknown}", code="unsupported_parameter")


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _wrong(place, "a text is needed")
    if LONE_SURROGATE.search(value):
        raise _wrong(place, "found half of a surrogate pair, which is no character")
    return value


def _wrong(place: str, message: str) -> ApiError:
    return ApiError(400, message, place=place, code="invalid_value")
