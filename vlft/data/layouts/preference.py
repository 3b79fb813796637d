"""Preference data: pairs of a chosen and a rejected reply, and labels of right and wrong."""

from __future__ import annotations

from typing import Any

from vlft.data.layouts.ask import LayoutError
from vlft.data.layouts.dialogue import is_dialogue
from vlft.data.layouts.fields import Fields
from vlft.data.layouts.turns import ROLES, SPEAKERS
from vlft.data.names import CHOSEN, DIALOGUES, QUESTIONS, REJECTED, REPLIES

LABEL = "keep the right replies alone, in a file without this column"


def chosen_only(fields: Fields, preference: str | None) -> Fields:
    """The fields with the chosen reply as the reply, and without the rejected one.

    Raises:
        LayoutError: there are both, and nothing says that the chosen one is to be learnt.
    """
    found = [
        name
        for name in fields.values
        if (name in CHOSEN or name.startswith(REJECTED)) and fields.filled(name)
    ]
    if not found:
        return fields
    if preference is None:
        what = f"found {', '.join(found)}, a pair of preferences"
        raise LayoutError(what, fields, "add --preference chosen to train the chosen replies")
    rest = {name: value for name, value in fields.values.items() if name not in found}
    chosen = next((fields.values[name] for name in reversed(CHOSEN) if name in found), None)
    if chosen is not None:
        fields.read.update(_add(rest, chosen))
    made = Fields(rest, fields.given)
    made.read = fields.read
    fields.read.update(found)
    return made


def _add(values: dict[str, Any], chosen: Any) -> set[str]:
    """Puts the chosen reply, or the dialogue that ends with it, into the fields.

    Returns:
        Names of the fields that are taken out, because the dialogue has them now.
    """
    dialogue = next((name for name in DIALOGUES if is_dialogue(values.get(name))), None)
    reply = [chosen] if isinstance(chosen, dict) else chosen
    if is_dialogue(reply) and reply and _speaker(reply[0]) != "assistant":
        # A whole dialogue, which repeats the question.
        for name in (*DIALOGUES, *QUESTIONS, *REPLIES):
            values.pop(name, None)
        values["messages"] = reply
    elif dialogue is not None:
        texts = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
        values[dialogue] = [*values[dialogue], *texts]
    elif is_dialogue(reply) and is_dialogue(values.get("prompt")):
        values["messages"] = [*values.pop("prompt"), *reply]
        return {"prompt"}
    elif is_dialogue(reply) and len(reply) == 1:
        values["response"] = reply[0].get("content", reply[0].get("value"))
    else:
        values["response"] = reply
    return set()


def _speaker(turn: dict[str, Any]) -> str | None:
    said = next((turn[key] for key in ROLES if isinstance(turn.get(key), str)), "")
    return SPEAKERS.get(said.removeprefix("<|").removesuffix("|>").lower())


def refuse_labels(fields: Fields) -> None:
    """Raises LayoutError for records that say of their reply that it is right or wrong."""
    is_free = "label" not in fields.given.values()
    if fields.values.get("kto_tag") is not None:
        raise LayoutError("found kto_tag, which marks wrong replies", fields, LABEL)
    if is_free and isinstance(fields.values.get("label"), bool):
        raise LayoutError(
            "found label with true or false, which marks wrong replies", fields, LABEL
        )
