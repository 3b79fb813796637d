"""Layouts with a list of turns: messages, conversations (ShareGPT, LLaVA), pairs.

{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
{"texts": [{"user": "...", "assistant": "..."}]}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.data.layouts.ask import LayoutError
from vlft.data.layouts.draft import Layout, Message
from vlft.data.layouts.turns import TURN_KEYS, make_draft, read_turns
from vlft.errors import DataError

if TYPE_CHECKING:
    from vlft.data.layouts.draft import Draft
    from vlft.data.layouts.fields import Fields
    from vlft.data.options import Reading


def is_dialogue(value: Any) -> bool:
    """Whether a value is a list of objects, or an empty list."""
    return isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)


def system_of(fields: Fields) -> str | None:
    """The system prompt of a record's own field."""
    name = fields.first(fields.named("system"))
    return None if name is None else fields.text(name)


def _names(fields: Fields) -> list[str]:
    return [name for name in fields.named("messages") if is_dialogue(fields.values.get(name))]


def _read(fields: Fields, _reading: Reading) -> list[Draft]:
    names = [name for name in _names(fields) if fields.filled(name)] or _names(fields)[:1]
    if len(names) > 1:
        found = f"{' and '.join(names)} are lists of turns"
        raise LayoutError(found, fields, f"say which: --columns messages={names[0]}")
    messages = read_turns(fields.take(names[0]), names[0])
    if "response" in fields.given:
        # Without the flag a column beside a dialogue is not its reply.
        if messages and messages[-1].speaker == "assistant":
            found = f'"{names[0]}" has a reply, and --columns names another one'
            raise DataError(found, hint="leave out --columns response=...")
        reply = fields.given["response"]
        messages.append(Message("assistant", (fields.text(reply),), f'"{reply}"'))
    return [make_draft(messages, system_of(fields))]


def _read_list(fields: Fields, _reading: Reading) -> list[Draft]:
    turns = fields.turns or ()
    if all(TURN_KEYS.isdisjoint(turn) for turn in turns):
        found = f"found a list of {len(turns)} objects, none of which is a turn"
        raise DataError(
            found, hint="write each sample as a record of its own; vlft packs by itself"
        )
    return [make_draft(read_turns(turns, "the record"), None)]


MESSAGE_LIST = Layout(
    "list",
    "a list of messages",
    lambda fields: bool(fields.turns) and is_dialogue(fields.turns),
    _read_list,
)


def _fits(fields: Fields) -> bool:
    names = _names(fields)
    others = (*fields.named("query"), *fields.named("response"))
    # An empty list is a dialogue only if nothing else can be the sample.
    return any(map(fields.filled, names)) or bool(names and not any(map(fields.filled, others)))


DIALOGUE = Layout("messages", "a list of turns", _fits, _read)
