"""Lists of messages or of pairs -> messages, in the names that this field uses."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from vlft.data.layouts.draft import Draft, ImagePart, Message
from vlft.data.layouts.fields import as_text, wrong_type
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.data.layouts.draft import Content, Speaker

SPEAKERS: dict[str, Speaker] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
PAIRS = (("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("question", "answer"))
ROLES, CONTENTS = ("role", "from"), ("content", "value", "text")
LOSSES = ("loss", "loss_weight", "weight")
CALLS = ("tool_calls", "function_call")
OWN_IMAGES = ("images", "image")
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "source", "value")
# The keys that make an object a turn, and all keys that are read of a turn.
TURN_KEYS = frozenset((*ROLES, *chain(*PAIRS)))
READ_KEYS = TURN_KEYS.union(CONTENTS, LOSSES, CALLS, OWN_IMAGES)
EXAMPLE = '{"role": "user", "content": "..."}'
SKIP = "drop such records with --on-bad-sample skip"


def read_turns(turns: Sequence[Any], what: str) -> list[Message]:
    """The messages of a list of turns or pairs.

    Args:
        turns: objects.
        what: the name of the list, for messages.

    Raises:
        DataError: with the number of the turn.
    """
    if not turns:
        raise DataError(f'"{what}" has no turn', hint=f"write e.g. [{EXAMPLE}, ...]")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        name = f"turn {number}"
        if not isinstance(turn, dict):
            raise wrong_type(turn, name, "an object", EXAMPLE)
        pair = next((pair for pair in PAIRS if all(key in turn for key in pair)), None)
        if pair is not None and all(turn.get(key) is None for key in ROLES):
            question, reply = (as_text(turn[key], f'{name}: "{key}"') for key in pair)
            messages += [
                Message("user", (question,), name),
                Message("assistant", (reply,), name, is_trained=_is_trained(turn, name)),
            ]
        else:
            messages.append(_message(turn, name))
    return messages


def unread_keys(turns: Sequence[Any]) -> list[str]:
    """The keys with a value in a list of turns or pairs that no rule reads, each once."""
    if not any(isinstance(turn, dict) and not TURN_KEYS.isdisjoint(turn) for turn in turns):
        return []
    filled = (
        key
        for turn in turns
        if isinstance(turn, dict)
        for key, value in turn.items()
        if key not in READ_KEYS and value not in (None, "", [], {}, False)
    )
    return list(dict.fromkeys(filled))


def make_draft(messages: Sequence[Message], system: str | None) -> Draft:
    """The dialogue of messages, the first of which may be the system prompt.

    Raises:
        DataError: users and assistants do not alternate, or a system prompt is inside.
    """
    if messages and messages[0].speaker == "system":
        first, *messages = messages
        if first.images is not None or not all(isinstance(part, str) for part in first.content):
            raise DataError(f"found an image in {first.name}, the system prompt")
        system = "".join(map(str, first.content))
    for index, message in enumerate(messages):
        expected = "assistant" if index % 2 else "user"
        if message.speaker != expected:
            said = f"{message.name} is of the {message.speaker}"
            if message.speaker == "system":
                raise DataError(f"{said}; only the first turn may be a system prompt", hint=SKIP)
            raise DataError(f"{said} where one of the {expected} is allowed", hint=SKIP)
    if not messages:
        raise DataError("there is only a system prompt", hint=SKIP)
    return Draft(tuple(messages), system)


def _message(turn: Mapping[str, Any], name: str) -> Message:
    role_key = _only(turn, ROLES, name)
    said = as_text(turn[role_key], f'{name}: "{role_key}"', EXAMPLE)
    call = next((key for key in CALLS if turn.get(key)), None)
    if call is not None:
        found = f"{name}, of {said!r}, holds {call}; these models' chat text has no tools"
        raise DataError(found, hint=SKIP)
    speaker = SPEAKERS.get(said.removeprefix("<|").removesuffix("|>").strip().lower())
    if speaker is None:
        found = f"{name} is of {said[:60]!r}, a role that these models' chat text does not have"
        raise DataError(found, hint=f"allowed: {', '.join(SPEAKERS)}; {SKIP}")
    key = _only(turn, CONTENTS, name, default="value" if role_key == "from" else "content")
    content = _content(turn.get(key), f'{name}: "{key}"')
    own = [turn[key] for key in OWN_IMAGES if turn.get(key) not in (None, "", [])]
    if len(own) > 1:
        raise DataError(f"{name} has image and images", hint="keep one of the two")
    trained = _is_trained(turn, name)
    if speaker != "assistant" and trained and any(turn.get(key) for key in LOSSES):
        found = f"{name} is to be trained; only replies are"
        raise DataError(found, hint="leave out its loss")
    return Message(speaker, content, name, own[0] if own else None, trained)


def _only(turn: Mapping[str, Any], keys: Sequence[str], name: str, default: str = "") -> str:
    """The one key of several that a turn has.

    Raises:
        DataError: it has none, or two that differ.
    """
    found = [key for key in keys if turn.get(key) is not None]
    if len(found) > 1 and any(turn[key] != turn[found[0]] for key in found):
        raise DataError(f"{name} has {' and '.join(found)}", hint="keep one of them")
    there = found or [key for key in keys if key in turn]
    if not there:
        raise DataError(f'{name} has no "{default or keys[0]}"', hint=f"write e.g. {EXAMPLE}")
    return there[0]


def _is_trained(turn: Mapping[str, Any], name: str) -> bool:
    """Whether the reply of a turn is trained, as its loss says.

    Raises:
        DataError: a loss that is neither 0 nor 1.
    """
    given = {key: turn[key] for key in LOSSES if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1) or isinstance(value, str):
            found = f'{name}: "{key}" is {value!r:.50}; true or 1, and false or 0 are allowed'
            raise DataError(found, hint="leave it out, or drop the record")
    return all(given.values())


def _content(value: Any, name: str) -> Content:
    """Text, or a list of parts.

    Raises:
        DataError: another value, or a part that is neither text nor an image.
    """
    if not isinstance(value, list | tuple):
        return (as_text(value, name, EXAMPLE),)
    return tuple(
        _part(part, f"{name}, part {number}") for number, part in enumerate(value, start=1)
    )


def _part(part: Any, name: str) -> str | ImagePart:
    example = '{"type": "text", "text": "..."}'
    if not isinstance(part, dict):
        raise wrong_type(part, name, "an object", example)
    kind = part.get("type")
    filled = {key: value for key, value in part.items() if value is not None}
    if kind == "text":
        key = "value" if "text" not in filled and "value" in filled else "text"
        return as_text(part.get(key), f'{name}: "{key}"', example)
    if kind not in ("image", "image_url"):
        found = f"{name} is {kind!r:.60}; text and image are allowed"
        raise DataError(found, hint=SKIP)
    values = [(key, filled[key]) for key in IMAGE_KEYS if key in filled]
    if len(values) > 1:
        raise DataError(f"{name} has {' and '.join(key for key, _ in values)}", hint="keep one")
    if values:
        key, image = values[0]
        if key in ("image_url", "source") and isinstance(image, dict):
            # {"url": ...}, or {"type": "base64", "media_type": ..., "data": ...}
            data = image.get("data")
            image = f"data:;base64,{data}" if isinstance(data, str) else image.get("url")
        if key == "base64" and isinstance(image, str) and not image.startswith("data:"):
            image = f"data:;base64,{image}"
        return ImagePart(image)
    index = filled.get("index")
    if index is not None and (isinstance(index, bool) or not isinstance(index, int)):
        raise wrong_type(index, f'{name}: "index"', "a whole number", '"index": 0')
    return ImagePart(None, index)
