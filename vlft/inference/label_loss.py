"""``--label-loss``: how likely the right reply of a record is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from vlft.errors import ConfigError
from vlft.vision.encode import moved

if TYPE_CHECKING:
    from vlft.data.conversation import Conversation
    from vlft.families.processor import Processor


class LabelLoss(NamedTuple):
    """The loss of a reply; no tokens if a record has none."""

    nats: float  # mean cross-entropy of a token
    tokens: int  # of the reply, the token that ends it included

    def as_row(self) -> dict[str, float | int]:
        """The columns of a result line."""
        return {"label_loss": self.nats, "label_tokens": self.tokens}


def label_loss(model: Any, processor: Processor, conversation: Conversation) -> LabelLoss:
    """The loss of the last reply of a record, after its prompt.

    Args:
        model: transformers' class, with peft's layers in place if there are any.
        processor: of the model.
        conversation: the record.

    Raises:
        ConfigError: the family's replies have a window.
        DataError: an image cannot be read.
    """
    if conversation.reply is None:
        return LabelLoss(0.0, 0)
    if processor.chat.window is not None:
        found = "the loss of replies with a window is not computed"
        raise ConfigError(found, place="--label-loss", hint="leave it out")
    start = len(processor.encode_conversation(conversation.without_reply()))
    sample = processor.encode_conversation(conversation)
    head = model.get_output_embeddings()
    # Logits of prompts, which are most of them, are never made.
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, start - 1 : -1],))
    try:
        with torch.inference_mode():
            inputs = moved(processor.collate([sample]), model.get_input_embeddings().weight)
            del inputs["labels"]
            logits = model(**inputs, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    targets = sample.input_ids[start:].to(logits.device)
    return LabelLoss(float(F.cross_entropy(logits, targets)), len(targets))
