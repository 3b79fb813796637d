"""Records -> drafts of conversations, by one ordered list of rules on the names of their fields."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlft.data.layouts.ask import LayoutError
from vlft.data.layouts.completion import COMPLETION
from vlft.data.layouts.dialogue import DIALOGUE, MESSAGE_LIST
from vlft.data.layouts.objects import objects_of
from vlft.data.layouts.place_objects import with_objects
from vlft.data.layouts.preference import chosen_only, refuse_labels
from vlft.data.layouts.question import QUESTION
from vlft.data.names import OTHER_MEDIA
from vlft.data.records import EXAMPLE, kind_of
from vlft.errors import DataError

if TYPE_CHECKING:
    from vlft.data.layouts.draft import Draft, Layout
    from vlft.data.layouts.fields import Fields
    from vlft.data.options import Reading

# The first one that fits reads the record.
RULES: tuple[Layout, ...] = (MESSAGE_LIST, COMPLETION, DIALOGUE, QUESTION)


def drafts_of(fields: Fields, reading: Reading) -> tuple[list[Draft], Layout]:
    """The drafts of a record's conversations, mostly one, and the rule that read them.

    Raises:
        DataError: the record cannot be read, or only with a flag that says how.
    """
    _refuse_other_media(fields)
    fields = chosen_only(fields, reading.preference)
    refuse_labels(fields)
    rules = [rule for rule in RULES if reading.layout in ("auto", rule.name)]
    rule = next((rule for rule in rules if rule.fits(fields)), None)
    if rule is None and fields.turns is not None:
        found = f"found {kind_of(fields.turns)}, an object or a list of messages is allowed"
        raise DataError(found, hint=EXAMPLE)
    if rule is None:
        raise LayoutError(
            f"the record is not in the layout {reading.layout}", fields, "leave out --layout"
        )
    objects = objects_of(fields, reading)
    if objects is None:
        drafts = rule.read(fields, reading)
    else:
        is_reply = reading.objects == "reply"
        needed = replace(reading, need_response=reading.need_response and not is_reply)
        drafts = [with_objects(d, objects, fields, reading) for d in rule.read(fields, needed)]
    # Some tools write lists of tools as text.
    if fields.filled("tools") and fields.values["tools"] != "[]":
        raise DataError(
            'found "tools"; the chat text of these models has none',
            hint="drop such records with --on-bad-sample skip",
        )
    return drafts, rule


def _refuse_other_media(fields: Fields) -> None:
    for name in OTHER_MEDIA:
        if fields.filled(name):
            raise DataError(
                f'found "{name}"; these models take images and text',
                hint="drop such records with --on-bad-sample skip",
            )
