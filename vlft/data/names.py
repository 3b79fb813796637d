"""The names under which data files keep what a conversation is made of."""

from __future__ import annotations

DIALOGUES = ("messages", "conversations", "conversation", "texts", "qa")
QUESTIONS = ("query", "prompt", "question", "problem", "instruction", "input", "prefix")
REPLIES = ("response", "completion", "answer", "output", "solution", "suffix")
IMAGES = ("images", "image", "image_path", "image_paths", "file_name")
SYSTEMS = ("system", "system_prompt")
CHOSEN = ("chosen", "chosen_messages")
REJECTED = "rejected"
# The image that the reply is, for families that draw.
DRAWN = "response_images"
# What no family of this field reads; an empty value is nothing.
OTHER_MEDIA = ("videos", "video", "audios", "audio")
# Beside them a reply may be the letter, the number or the text of a choice.
CHOICES = ("choices", "options")
# Kept with the record and written into results; no rule reads them.
KEPT = ("id", "meta")

# An object with one of these is a record; another one may hold the list of the records.
OF_A_RECORD = frozenset((*DIALOGUES, *QUESTIONS, *REPLIES, *CHOSEN, "answers"))
KNOWN = OF_A_RECORD | {
    *IMAGES,
    *SYSTEMS,
    *OTHER_MEDIA,
    *KEPT,
    DRAWN,
    "history",
    "tools",
    "objects",
    "weight",
}

# What --columns gives a column to -> the names that mean the same.
ROLES = {
    "messages": DIALOGUES,
    "query": (*QUESTIONS, "user"),
    "response": (*REPLIES, "assistant"),
    "images": IMAGES,
    "system": SYSTEMS,
    "history": ("history",),
}


def role_of(name: str) -> str | None:
    """The role that a name means, None if it means none."""
    return next((role for role, names in ROLES.items() if name in names), None)
