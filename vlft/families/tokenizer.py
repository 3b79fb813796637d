"""tokenizer.json and the files beside it -> a tokenizer that was tried, and its special tokens."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from vlft.errors import CheckpointError, shown
from vlft.families.schemas import TOKENS
from vlft.files import read_object, read_object_if_there
from vlft.schema import ANY

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.families.base import Family

# The padding token of tokenizers that name none.
PAD = "<｜▁pad▁｜>"
# Read back as it is by the byte-level tokenizers of all families.
PROBE = "A cat: 12\n猫"
# Published tokenizers have no normalizer that adds a character.
MOST_GROWTH = 8


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, tried on a few characters.

    Raises:
        CheckpointError: it cannot be used, or would make texts much longer.
    """
    path = folder / "tokenizer.json"
    fields = read_object(path, ANY)
    hint = "use the tokenizer files that were published with this model"
    if _growth(fields.get("normalizer")) > MOST_GROWTH:
        found = "its normalizer makes a text much longer"
        raise CheckpointError(found, place=shown(path), hint=hint)
    try:
        tokenizer = Tokenizer.from_str(json.dumps(fields))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        text = tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False).ids)
    except Exception as error:  # noqa: BLE001 (tokenizers has no class of its own for errors)
        found = f"not a tokenizer: {error}"
        raise CheckpointError(found, place=shown(path), hint=hint) from None
    if text != PROBE:
        found = f"reads {PROBE!r} as {text!r}"
        raise CheckpointError(found, place=shown(path), hint=hint)
    return tokenizer


def _growth(normalizer: Any) -> float:
    """By how much a normalizer of tokenizer.json may multiply the length of a text."""
    if not isinstance(normalizer, dict):
        return 1
    parts = normalizer.get("normalizers")
    added = normalizer.get("content") or normalizer.get("prepend") or ""
    own = max(1, len(added)) if isinstance(added, str) else 1
    return math.prod(map(_growth, parts), start=own) if isinstance(parts, list) else own


def add_tokens(tokenizer: Tokenizer, family: Family, names: dict[str, str]) -> None:
    """Adds the special tokens that the tokenizer lacks, in the order of the authors' processor."""
    for token in (*family.added_tokens, family.image_tag):
        if token == PAD and names.get("pad_token"):
            continue
        if tokenizer.token_to_id(token) is None:
            tokenizer.add_special_tokens([AddedToken(token, special=True)])
        if token == PAD:
            names["pad_token"] = PAD


def special_tokens(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, pad_token; tokenizer_config.json overrides special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_object_if_there(folder / name, TOKENS).items():
            if key in ("bos_token", "eos_token", "pad_token") and value is not None:
                found[key] = str(value.get("content")) if isinstance(value, dict) else value
    return found


def token_id(tokenizer: Tokenizer, token: str | None, name: str, folder: Path) -> int:
    """The id of a token; ``name`` says what it is for.

    Raises:
        CheckpointError: the tokenizer does not have it.
    """
    found = tokenizer.token_to_id(token) if token else None
    if found is None:
        raise CheckpointError(
            f"{name} is {token!r}, which is not in tokenizer.json",
            place=shown(folder),
            hint="use the tokenizer files that were published with this model",
        )
    return int(found)


def check_token_ids(folder: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Raises CheckpointError if a token has no row in an embedding of so many rows."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise CheckpointError(
            f"the largest token id is {largest}, the model has {rows} embeddings",
            place=shown(folder / "tokenizer.json"),
            hint="use the tokenizer files that were published with this model",
        )
