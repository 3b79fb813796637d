"""The ways in which families write a conversation as text and cut it for the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlft.data.conversation import flat_text
from vlft.data.encode import ChatText, Piece

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation, Turn
    from vlft.data.encode import ChatFormat


def as_a_whole(conversation: Conversation, chat: ChatFormat) -> ChatText:
    """The text of the template, tokenised as a whole."""
    text, replies = _render(conversation, chat)
    return ChatText(text, (Piece(text, replies),))


def by_message(conversation: Conversation, chat: ChatFormat) -> ChatText:
    """The text of the template; each message is tokenised on its own, so no token spans two.

    Replies are tokenised without the space that stands before them in the text.
    """
    system = chat.system_prompt if conversation.system is None else conversation.system
    pieces = [Piece(system.strip())]
    for turn in conversation.turns:
        if turn.role == "user":
            alone = replace(conversation, turns=(turn,), system="")
            pieces.append(Piece(_render(alone, chat)[0]))
        else:
            pieces += reply_pieces(turn, flat_text(turn, chat.image_tag).strip(), chat)
    return ChatText(_render(conversation, chat)[0], tuple(pieces))


def reply_pieces(turn: Turn, reply: str, chat: ChatFormat) -> list[Piece]:
    """The reply of a turn and the token that ends it, both trained if the turn is."""
    texts = (reply, chat.eos_token)
    return [Piece(text, ((0, len(text)),) if turn.is_trained else ()) for text in texts]


def _render(
    conversation: Conversation, chat: ChatFormat
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text of the template, and (start, end) of each trained span of it, in characters."""
    from transformers.utils.chat_template_utils import render_jinja_template

    system = chat.system_prompt if conversation.system is None else conversation.system
    texts, spans = render_jinja_template(
        [[_message(turn, chat) for turn in conversation.turns]],
        chat_template=chat.template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=conversation.turns[-1].role == "user",
        system=system,
        assistant=chat.roles[1],
        eos_token=chat.eos_token,
    )
    text = texts[0]
    cut = len(text) - len(text.lstrip())
    # Each reply is one span; a chat may have an empty one, which has none.
    replies = [t for t in conversation.turns if t.role == "assistant" and flat_text(t, "").strip()]
    trained = [s for s, turn in zip(spans[0], replies, strict=True) if turn.is_trained]
    return text.strip(), tuple((start - cut, end - cut) for start, end in trained)


def _message(turn: Turn, chat: ChatFormat) -> dict[str, str]:
    role = chat.roles[0] if turn.role == "user" else chat.roles[1]
    return {"role": role, "content": flat_text(turn, chat.image_tag)}
