"""Prompt and completion as lists of messages: one dialogue, of which the completion is trained.

{"prompt": [{"role": "user", "content": "..."}],
 "completion": [{"role": "assistant", "content": "..."}]}
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlft.data.layouts.dialogue import is_dialogue, system_of
from vlft.data.layouts.draft import Layout
from vlft.data.layouts.turns import make_draft, read_turns

if TYPE_CHECKING:
    from vlft.data.layouts.draft import Draft
    from vlft.data.layouts.fields import Fields
    from vlft.data.options import Reading


def _fits(fields: Fields) -> bool:
    return all(
        fields.filled(name) and is_dialogue(fields.values[name])
        for name in ("prompt", "completion")
    )


def _read(fields: Fields, _reading: Reading) -> list[Draft]:
    prompt = read_turns(fields.take("prompt"), "prompt")
    context = [replace(message, is_trained=False) for message in prompt]
    completion = read_turns(fields.take("completion"), "completion")
    shifted = [replace(message, name=f"{message.name} of the completion") for message in completion]
    return [make_draft([*context, *shifted], system_of(fields))]


COMPLETION = Layout("completion", "prompt and completion as messages", _fits, _read)
