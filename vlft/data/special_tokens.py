"""Special tokens that data writes: in the text of a user they are plain text, not control.

Written by data, an end-of-sentence token or the name of a role would end a turn or begin another.
The special tokens of the chat text are tokens; of those in the texts of a conversation only the
ones that carry content are, like the tags of grounding, and added letters like DeepSeek-LLM's ü.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from vlft.console import warn
from vlft.errors import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlft.data.conversation import Conversation

# Tags of grounding and tables stay tokens: replies are made of them.
CONTENT = frozenset(
    {
        "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>",
        "<td>", "</td>", "<tr>", "</tr>",
    }
)  # fmt: skip
# Some tokenizers do not mark all of theirs as special.
CONTROL = re.compile(r"<[|｜].+[|｜]>")
# A lone surrogate, which no text of a conversation holds, for each first character of a token.
FIRST_STAND_IN = 0xD800


class SpecialTokens:
    """The special tokens of a tokenizer, and the tokenizer without them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: token_id for token_id, token in added.items()}
        self.guarded = frozenset(
            token.content
            for token in added.values()
            if token.content not in CONTENT and (token.special or CONTROL.fullmatch(token.content))
        )
        self._pattern = any_of(self.guarded)

    @cached_property
    def _bare(self) -> Tokenizer:
        """The tokenizer without added tokens. Made when it is needed, as this takes half a second.

        Leaving out some of them would number the others anew.
        """
        fields = json.loads(self._tokenizer.to_str())
        return Tokenizer.from_str(json.dumps({**fields, "added_tokens": []}))

    @cached_property
    def _any_added(self) -> re.Pattern[str]:
        return any_of(self._ids)

    @cached_property
    def _anywhere(self) -> re.Pattern[str]:
        """The empty string before each guarded token, also of tokens that overlap."""
        return re.compile(f"(?={self._pattern.pattern})")

    @cached_property
    def _stand_ins(self) -> dict[int, int]:
        firsts = sorted({ord(text[0]) for text in self.guarded})
        return {first: FIRST_STAND_IN + number for number, first in enumerate(firsts)}

    def found_in(self, conversation: Conversation) -> tuple[str, ...]:
        """The special tokens in the texts of a conversation, in order."""
        texts = [part for turn in conversation.turns for part in turn.parts if type(part) is str]
        return tuple(
            token for text in [conversation.system or "", *texts] for token in self._found(text)
        )

    def hide(self, conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
        """The conversation with stand-ins in its special tokens, and these tokens, in order."""
        found = self.found_in(conversation)
        if not found:
            return conversation, ()
        turns = (
            replace(
                turn,
                parts=tuple(self._masked(p) if isinstance(p, str) else p for p in turn.parts),
            )
            for turn in conversation.turns
        )
        system = conversation.system and self._masked(conversation.system)
        return replace(conversation, turns=tuple(turns), system=system), found

    def shown(self, text: str) -> str:
        """A text without stand-ins; its length does not change."""
        return text.translate({stand_in: first for first, stand_in in self._stand_ins.items()})

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and (start, end) of each in characters.

        Special tokens with stand-ins become the tokens of their characters. A tokenizer cuts a
        text at its added tokens before anything else, so the other ids are what it gives itself.
        """
        ids, offsets, end = list[int](), list[tuple[int, int]](), 0
        for start, stop in [*(m.span() for m in self._any_added.finditer(text)), (len(text),) * 2]:
            if end < start:
                encoding = self._bare.encode(self.shown(text[end:start]), add_special_tokens=False)
                ids += encoding.ids
                offsets += [(end + a, end + b) for a, b in encoding.offsets]
            if start < stop:
                ids.append(self._ids[text[start:stop]])
                offsets.append((start, stop))
            end = stop
        return ids, offsets

    def _found(self, text: str) -> list[str]:
        return self._pattern.findall(text) if self.guarded else []

    def _masked(self, text: str) -> str:
        if not self._pattern.search(text):
            return text
        starts = {match.start() for match in self._anywhere.finditer(text)}
        table = self._stand_ins
        return "".join(chr(table[ord(c)]) if i in starts else c for i, c in enumerate(text))


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of the texts, the longest that fits; of none, one that matches nothing.

    Texts with the same first two characters stand together: a tokenizer has a thousand tokens, and
    trying each at every ``<`` of a page would take longer than tokenising it.
    """
    groups = groupby(sorted(texts), key=lambda text: text[:2])
    by_head = {head: sorted((text[2:] for text in group), key=len) for head, group in groups}
    # The longest first, because the first that fits is taken.
    heads = sorted(by_head, key=len, reverse=True)
    rests = ("|".join(map(re.escape, reversed(by_head[head]))) for head in heads)
    pairs = zip(heads, rests, strict=True)
    return re.compile("|".join(f"{re.escape(h)}(?:{rest})" for h, rest in pairs) or "(?!)")


def warn_of_special_tokens(found: Iterable[tuple[str, Sequence[str]]]) -> bool:
    """Says once how many special tokens were read as plain text, if any, and where the first is.

    Args:
        found: (place, tokens) of each conversation.
    """
    holding = [(place, tokens) for place, tokens in found if tokens]
    if not holding:
        return False
    place, tokens = holding[0]
    count = sum(len(more) for _, more in holding)
    what = "1 special token" if count == 1 else f"{count} special tokens"
    first = f"{shown(tokens[0])} in {place}" if place else shown(tokens[0])
    warn(
        f"{what} in texts, read as plain text (the first: {first}); "
        "--special-tokens keep reads them as tokens, as the authors' code does"
    )
    return True
