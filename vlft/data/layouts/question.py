"""A question and a reply, under the names that this field gives them.

{"query": "...", "response": "...", "history": [["question", "reply"]], "images": ["a.jpg"]}
{"instruction": "...", "input": "...", "output": "..."}
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from vlft.data.layouts.ask import LayoutError
from vlft.data.layouts.dialogue import system_of
from vlft.data.layouts.draft import Layout, Message
from vlft.data.layouts.fields import as_text, wrong_type
from vlft.data.layouts.turns import make_draft
from vlft.data.names import CHOICES, DIALOGUES, DRAWN

if TYPE_CHECKING:
    from vlft.data.layouts.draft import Draft
    from vlft.data.layouts.fields import Fields
    from vlft.data.options import Reading

# The name of a question that the user gave.
PROMPT = "--prompt"
HISTORY = '"history": [["question", "reply"]]'


def _read(fields: Fields, reading: Reading) -> list[Draft]:
    questions, replies = _candidates(fields, "query"), _candidates(fields, "response")
    if "instruction" in questions and "input" in questions:
        questions.remove("input")
    name = replies[0] if len(replies) == 1 else ""
    if not replies and "response" not in fields.given and _is_list(fields, "answers"):
        name = "answers"
    references = name and _is_list(fields, name)
    has_question = questions or reading.prompt is not None
    drawn = not replies and fields.filled(DRAWN)
    has_reply = replies or references or drawn or not reading.need_response
    if not has_question or not has_reply or len(questions) > 1 or len(replies) > 1:
        raise _ask(fields, questions, replies, has_question=bool(has_question))
    before = [*_history(fields), _question(fields, questions, reading)]
    if references:
        texts = _references(fields, name, reading)
    elif replies:
        _refuse_choices(fields, name)
        texts = [fields.text(name)]
    else:
        return [make_draft(before, system_of(fields))]
    drafts = ([*before, Message("assistant", (text,), f'"{name}"')] for text in texts)
    return [make_draft(messages, system_of(fields)) for messages in drafts]


def _candidates(fields: Fields, role: str) -> list[str]:
    """The names that have a role in this record; empty ones only if there is no other."""
    names = [
        name
        for name in fields.named(role)
        if fields.values.get(name) is not None and (role in fields.given or fields.is_free(name))
    ]
    return [name for name in names if fields.filled(name)] or names[:1]


def _is_list(fields: Fields, name: str) -> bool:
    return isinstance(fields.values.get(name), list | tuple) and fields.filled(name)


def _question(fields: Fields, names: list[str], reading: Reading) -> Message:
    if not names:
        return Message("user", (str(reading.prompt),), PROMPT)
    text = fields.text(names[0])
    if names[0] == "instruction" and fields.values.get("input") is not None:
        more = fields.text("input") if fields.is_free("input") else ""
        text = f"{text}\n{more}" if more else text
    return Message("user", (text,), f'"{names[0]}"')


def _history(fields: Fields) -> list[Message]:
    name = fields.named("history")[0]
    pairs = fields.take(name)
    if pairs is None:
        return []
    allowed = f'"{name}"', 'a list of ["question", "reply"] pairs', HISTORY
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        for pair in pairs
    ):
        raise wrong_type(pairs, *allowed)
    return [
        Message("assistant" if index else "user", (as_text(text, f'"{name}"'),), f'"{name}"')
        for pair in pairs
        for index, text in enumerate(pair)
    ]


def _references(fields: Fields, name: str, reading: Reading) -> list[str]:
    """The reference answers that are trained, each in a sample of its own; --answers chooses them.

    Raises:
        LayoutError: nothing says which.
    """
    if reading.answers is None:
        raise LayoutError(
            f"found {name}, a list; which one is to be learnt is not said",
            fields,
            "add --answers first, most (the most frequent) or each (a sample for each)",
        )
    texts = [
        as_text(item.get("answer") if isinstance(item, dict) else item, f'"{name}"', '["..."]')
        for item in fields.take(name)
    ]
    if reading.answers == "each":
        return list(dict.fromkeys(texts))
    return [Counter(texts).most_common(1)[0][0] if reading.answers == "most" else texts[0]]


def _refuse_choices(fields: Fields, reply: str) -> None:
    """Raises LayoutError if the reply stands beside choices, unless the user has named it."""
    lists = [name for name in CHOICES if fields.filled(name)]
    letters = ["A", "B"] if fields.filled("A") and fields.filled("B") else []
    if (lists or letters) and "response" not in fields.given:
        raise LayoutError(
            f"found {reply} beside {' and '.join(lists or letters)}; whether it is a letter, a "
            "number or a text is not said",
            fields,
            f"write the reply as text into a column; --columns response={reply} trains it as it is",
        )


def _ask(
    fields: Fields, questions: list[str], replies: list[str], *, has_question: bool
) -> LayoutError:
    """The error of a record without question or reply, or with two."""
    if len(questions) > 1 or len(replies) > 1:
        role, names = ("question", questions) if len(questions) > 1 else ("reply", replies)
        target = "query" if role == "question" else "response"
        found = f"{' and '.join(names)} could be the {role}"
        return LayoutError(found, fields, f"say which: --columns {target}={names[0]}")
    dialogue = next((name for name in DIALOGUES if fields.filled(name)), None)
    if dialogue is not None and not questions and not replies:
        value = fields.values[dialogue]
        hint = 'write e.g. "messages": [{"role": "user", "content": "..."}, ...]'
        if isinstance(value, str) and value.lstrip().startswith("["):
            hint = "it is a text that holds JSON: write the list itself, as json.loads gives it"
        return LayoutError(f'"{dialogue}" is no list of turns', fields, hint)
    if "layout_dets" in fields.values:
        hint = "vlft data converts OmniDocBench, see vlft data --help"
        return LayoutError("the records are pages of layout_dets", fields, hint)
    missing, hints = [], []
    if not has_question:
        missing.append("question")
        hints.append("--columns query=COLUMN, or --prompt TEXT if it is the same for all")
    if not replies:
        missing.append("reply")
        hints.append("--columns response=COLUMN")
    found = f"no {' and no '.join(missing)} among the columns that are known"
    return LayoutError(found, fields, f"name it: {'; '.join(hints)}")


QUESTION = Layout("query", "a question and a reply", lambda fields: fields.turns is None, _read)
