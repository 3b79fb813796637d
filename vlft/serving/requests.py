"""The body of a request for a reply -> checked values. A field is used, neutral, or an error.

{"model": ..., "messages": [...], "temperature": 0, "stream": true}  ->  ChatRequest
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlft.config.inference import LOWEST_TEMPERATURE
from vlft.serving.messages import Message, read_messages
from vlft.serving.problems import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_STOPS, LONGEST_STOP = 16, 1000
LARGEST_SEED = 2**63 - 1
# (smallest, largest) of the numbers; whole ones are ints.
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 10**6),
    "repetition_penalty": (0.01, 100.0),
    "max_tokens": (1, 10**9),
    "max_completion_tokens": (1, 10**9),
    "seed": (-LARGEST_SEED - 1, LARGEST_SEED),
}
# Fields whose other values ask for what this server does not do.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# They name a request for the client's own books, and ask for nothing.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
OTHERS = ("model", "messages", "stream", "stream_options", "stop")
KNOWN = (*OTHERS, *NUMBERS, *NEUTRAL, *LABELS)


@dataclass(frozen=True)
class ChatRequest:
    """What a client asks for.

    Attributes:
        model: its name.
        messages: at least one.
        numbers: those of NUMBERS that were given.
        stop: texts that end the reply.
        stream: whether the reply is sent piece by piece.
        include_usage: whether a stream ends with the counts of tokens.
    """

    model: str
    messages: tuple[Message, ...]
    numbers: Mapping[str, Any]
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def most(self) -> int | None:
        """The most new tokens that were asked for."""
        names = ("max_completion_tokens", "max_tokens")
        return next((self.numbers[name] for name in names if name in self.numbers), None)


def read_request(body: bytes) -> ChatRequest:
    """The request in the body of an HTTP request.

    Raises:
        ApiError: it is not JSON, or asks for what this server does not do.
    """
    given = {name: value for name, value in _object(body).items() if value is not None}
    for name, value in given.items():
        _check_known(name, value)
    model = given.get("model")
    if not isinstance(model, str):
        hint = "GET /v1/models lists the names"
        raise ApiError(400, f"{_found(model)}, a name is needed", place="model", hint=hint)
    numbers = {name: _number(name, given[name]) for name in NUMBERS if name in given}
    if 0 < numbers.get("temperature", 0) < LOWEST_TEMPERATURE:
        allowed = f"0 (greedy) or at least {LOWEST_TEMPERATURE:g} is allowed"
        found = f"found {numbers['temperature']:g}, {allowed}"
        raise ApiError(400, found, place="temperature", code="invalid_value")
    stream = _boolean(given.get("stream", False), "stream")
    return ChatRequest(
        model,
        read_messages(given.get("messages")),
        numbers,
        _stops(given.get("stop", [])),
        stream,
        _include_usage(given.get("stream_options"), stream),
    )


def _object(body: bytes) -> dict[str, Any]:
    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no number of JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {_kind(value)}, an object is needed", code="invalid_json")
    return value


def _check_known(name: str, value: Any) -> None:
    """Raises ApiError for a field that is not known, or asks for what is not done."""
    if name in NEUTRAL and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
        allowed = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[name])
        found = f"{_found(value)}, which is not supported; allowed: {allowed}"
        raise ApiError(400, found, place=name, code="unsupported_value")
    if name not in KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        found = "a field that is not supported"
        raise ApiError(400, found, place=name, code="unsupported_parameter", hint=hint)


def _same(value: Any, other: Any) -> bool:
    """Whether two values of JSON are equal: 1 and true are not, 0 and 0.0 are."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _number(name: str, value: Any) -> Any:
    smallest, largest = NUMBERS[name]
    kinds, word = (
        ((int,), "a whole number") if isinstance(smallest, int) else ((int, float), "a number")
    )
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not smallest <= value <= largest:
        allowed = f"{word} from {smallest:g} to {largest:g} is allowed"
        raise ApiError(400, f"{_found(value)}, {allowed}", place=name, code="invalid_value")
    if name == "top_p" and value == 0:
        raise ApiError(400, "found 0, more than 0 is allowed", place=name, code="invalid_value")
    return value if isinstance(smallest, int) else float(value)


def _boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        found = f"{_found(value)}, true or false is allowed"
        raise ApiError(400, found, place=name, code="invalid_value")
    return value


def _include_usage(value: Any, stream: bool) -> bool:
    """What ``stream_options`` says about usage."""
    if value is None:
        return False
    place = "stream_options"
    if not isinstance(value, dict):
        found = f"{_found(value)}, an object is allowed"
        raise ApiError(400, found, place=place, code="invalid_value")
    if not stream:
        raise ApiError(400, "found without stream", place=place, code="invalid_value")
    # What pads the pieces against listeners; this server does not.
    unknown = next((name for name in value if name != "include_usage"), None)
    if unknown == "include_obfuscation" and value[unknown] is False:
        unknown = None
    if unknown is not None:
        found = "a field that is not supported"
        raise ApiError(400, found, place=f"{place}.{unknown}", code="unsupported_parameter")
    return _boolean(value.get("include_usage", False), f"{place}.include_usage")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    ):
        allowed = f"a text or a list of at most {MOST_STOPS}, none empty, is allowed"
        raise ApiError(400, f"{_found(value)}, {allowed}", place="stop", code="invalid_value")
    return tuple(stops)


def _found(value: Any) -> str:
    if value is None:
        return "found nothing"
    text = json.dumps(value, ensure_ascii=False)
    return f"found {text if len(text) <= 60 else text[:60] + '...'}"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
