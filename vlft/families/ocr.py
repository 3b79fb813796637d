"""What DeepSeek-OCR and DeepSeek-OCR-2 share besides pages: tensor names, features, chat text."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from vlft.data.conversation import flat_text
from vlft.data.encode import ChatText, Piece
from vlft.errors import DataError
from vlft.families.chat_text import reply_pieces
from vlft.families.keymap import KeyRule
from vlft.families.ocr_pages import TOKEN_PIXELS
from vlft.families.sam import encoder_rules, neck_rules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from vlft.data.conversation import Conversation
    from vlft.data.encode import ChatFormat, Tiles


ONE_EACH = "make a record of each image and question; in a chat, /clear starts anew"


def key_rules() -> list[KeyRule]:
    """The rules of SAM, projector, separator and LLM, in both families the same."""
    llm = ("layers.{rest}", "embed_tokens.{p}", "norm.{p}")
    return [
        *_sam_rules("model.sam_model", "model.vision_tower.sam_encoder"),
        KeyRule("model.projector.layers.{p}", ("model.multi_modal_projector.{p}",)),
        KeyRule("model.view_seperator", ("model.view_separator",)),
        *_expert_rules(
            "model.layers.{i}.mlp.experts", "model.language_model.layers.{i}.mlp.experts"
        ),
        *(KeyRule(f"model.{name}", (f"model.language_model.{name}",)) for name in llm),
        KeyRule("lm_head.{p}", ("lm_head.{p}",)),
    ]


def _sam_rules(sam: str, native: str) -> list[KeyRule]:
    return [
        *encoder_rules(sam, native),
        *neck_rules(f"{sam}.neck", f"{native}.neck"),
        KeyRule(f"{sam}.net_2.{{p}}", (f"{native}.proj.conv1.{{p}}",)),
        KeyRule(f"{sam}.net_3.{{p}}", (f"{native}.proj.conv2.{{p}}",)),
    ]


def _expert_rules(experts: str, native: str) -> list[KeyRule]:
    both = (f"{native}.gate_up_proj",)
    return [
        KeyRule(f"{experts}.{{e}}.gate_proj.weight", both, "stack", (0, 2)),
        KeyRule(f"{experts}.{{e}}.up_proj.weight", both, "stack", (1, 2)),
        KeyRule(f"{experts}.{{e}}.down_proj.weight", (f"{native}.down_proj",), "stack"),
    ]


def vision_features(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """(R, W) features of the towers: for each image the tokens of its tiles, then of its whole."""
    tower: Any = model.model.vision_tower  # type: ignore[union-attr]
    whole = tower(inputs["pixel_values"]).last_hidden_state
    if "pixel_values_local" not in inputs:
        features: Tensor = whole.flatten(0, 1)
        return features
    tiles = tower(inputs["pixel_values_local"]).last_hidden_state
    by_image = zip(tiles.split(inputs["num_local_patches"]), whole, strict=True)
    return torch.cat([part for local, page in by_image for part in (local.flatten(0, 1), page)])


def images_of(features: Tensor, tiles: Sequence[Tiles], tile: int) -> list[tuple[Tensor, Tensor]]:
    """For each image the rows of its tiles and those of its whole, of features (R, W) of them all.

    ``tile`` is the height and width of a tile, in pixels. All whole views are of one size.
    """
    in_tiles = [prod(grid) * (tile // TOKEN_PIXELS) ** 2 for grid in tiles]
    whole = (len(features) - sum(in_tiles)) // len(tiles)
    parts = torch.split(features, [rows for local in in_tiles for rows in (local, whole)])
    return list(zip(parts[::2], parts[1::2], strict=True))


def check_form(conversation: Conversation) -> None:
    """Raises DataError for several turns, several images or a system prompt: there is no form."""
    check_question(conversation)
    count = len(conversation.images)
    if count > 1:
        found = f"{count} images; the model was trained on one"
        raise DataError(found, place=conversation.place, hint=ONE_EACH)


def check_question(conversation: Conversation) -> None:
    """Raises DataError for several turns or a system prompt."""
    turns = len(conversation.turns)
    found = "a system prompt; the model was trained without" if conversation.system else None
    if turns > 2:
        found = f"{(turns + 1) // 2} turns; the model was trained on one"
    if found:
        raise DataError(found, place=conversation.place, hint=ONE_EACH)


def chat_text(conversation: Conversation, chat: ChatFormat) -> ChatText:
    """The prompt by itself and the reply right after it: no roles, no system prompt.

    Raises:
        DataError: see ``ChatFormat.check``.
    """
    assert chat.check is not None
    chat.check(conversation)
    turns = conversation.turns
    prompt = flat_text(turns[0], chat.image_tag).strip()
    pieces = [Piece(prompt)]
    if len(turns) == 2:
        pieces += reply_pieces(turns[1], flat_text(turns[1], chat.image_tag), chat)
    return ChatText("".join(piece.text for piece in pieces), tuple(pieces))
