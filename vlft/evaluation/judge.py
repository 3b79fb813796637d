"""Answers to validation records while a run trains, and what they score.

The replies are greedy and draw no random numbers, so that a run with a judge trains to the same
weights as one without. Each rank answers its share of the records.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.errors import DataError
from vlft.evaluation.own import find_metrics
from vlft.evaluation.statistics import weighted_mean
from vlft.inference.columns import Columns
from vlft.inference.features import Features
from vlft.inference.generate import Sampling
from vlft.inference.replier import Replier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from vlft.data.dataset import Dataset
    from vlft.data.encode import EncodedImage
    from vlft.distributed import World
    from vlft.families.processor import Processor
    from vlft.vision.encode import Stage

# Records that a rank answers at once.
BATCH = 8


@dataclass(frozen=True)
class Verdict:
    """What the answers of a model scored.

    Attributes:
        metric: its name.
        score: of all answers.
        higher_is_better: see Metric.
        rows: result lines as of ``vlft infer``, with the score of each; empty but on rank 0.
    """

    metric: str
    score: float
    higher_is_better: bool
    rows: Sequence[Mapping[str, Any]] = ()

    def is_better_than(self, other: float) -> bool:
        """Whether the score is better than another."""
        return self.score > other if self.higher_is_better else self.score < other


@dataclass(frozen=True)
class Seen:
    """Where the images of prompts come from: as of Features."""

    stage: Stage
    features: Mapping[str, Tensor]


class Judge:
    """Answers the same validation records whenever it is asked, and scores the answers.

    Args:
        metric: a name of ``vlft eval --metric``, or a Python file.
        model: that trains, peft's around it if there is an adapter; each rank holds all of it.
        processor: of the model.
        records: see ``choose``.
        seen: the features that the run has cached.
        world: the ranks.
        autocast: makes the context in which the model runs.

    Raises:
        UsageError: the metric cannot be used, or a reference by it.
    """

    def __init__(
        self,
        metric: str,
        model: Any,
        processor: Processor,
        records: Dataset,
        seen: Seen,
        world: World,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        ((self._name, self._metric),) = find_metrics([metric]).items()
        self._model, self._processor, self._seen = model, processor, seen
        self._records, self._world, self._autocast = records, world, autocast
        conversations = list(records.conversations)
        self._columns = Columns(conversations, processor.chat.system_prompt)
        self._labels = [conversation.reply or "" for conversation in conversations]
        self._score = self._metric.scorer([[label] for label in self._labels])
        for conversation, label in zip(conversations, self._labels, strict=True):
            try:
                self._score(label, [label])
            except ValueError as error:
                hint = "name an --eval-metric that fits the data"
                raise DataError(f"the reply {error}", place=conversation.place, hint=hint) from None
        self._prompts = [
            processor.encode_conversation(conversation.without_reply())
            for conversation in conversations
        ]
        lengths = [len(records[i]) - len(prompt) for i, prompt in enumerate(self._prompts)]
        # Enough for a right reply that is put another way; one that rambles ends here.
        self._sampling = Sampling(max_new_tokens=2 * max(lengths) + 16)

    def ask(self, stops: Callable[[Sequence[EncodedImage]], bool]) -> Verdict | None:
        """Has the model, in evaluation mode, answer, and scores it.

        Args:
            stops: called on all ranks before each batch, with its images.

        Returns:
            None if it stopped before the end.
        """
        world = self._world
        # Features are made anew: what encodes them may train.
        features = Features(
            self._model_itself, self._processor, self._seen.stage, self._seen.features
        )
        replier = Replier(self._model, self._processor, self._sampling, features)
        replies: dict[int, Any] = {}
        for start in range(0, len(self._prompts), BATCH * world.size):
            numbers = range(start, min(start + BATCH * world.size, len(self._prompts)))
            own = [number for number in numbers if number % world.size == world.rank]
            if stops([image for number in own for image in self._prompts[number].images]):
                return None
            with self._autocast():
                replies.update(zip(own, self._answered(replier, own), strict=True))
        found = {k: reply for part in world.all_gather(replies) for k, reply in part.items()}
        return self._verdict([found[number] for number in range(len(self._prompts))])

    @property
    def _model_itself(self) -> Any:
        model = self._model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _answered(self, replier: Replier, numbers: Sequence[int]) -> list[Any]:
        if not numbers:
            return []
        prompts = [self._prompts[number] for number in numbers]
        return next(replier.replies(prompts, [0] * len(prompts), [range(len(prompts))]))

    def _verdict(self, replies: Sequence[Any]) -> Verdict:
        texts = [reply.text for reply in replies]
        pairs = zip(texts, self._labels, strict=True)
        table = np.array([self._score(text, [label]) for text, label in pairs])
        score = weighted_mean(table[:, 0], table[:, 1])
        rows = (
            [
                self._row(*item)
                for item in zip(
                    self._records.conversations, replies, table[:, 0].tolist(), strict=True
                )
            ]
            if self._world.is_rank_zero
            else []
        )
        return Verdict(self._name, score, self._metric.higher_is_better, rows)

    def _row(self, conversation: Any, reply: Any, score: float) -> dict[str, Any]:
        row = self._columns.row(conversation)
        answer = {"response": reply.text, "finish": reply.finish, "score": score}
        return {"query": row.pop("query"), **answer, **row}


def choose(data: Dataset, most: int) -> Dataset:
    """At most so many records whose reply is a text, evenly over the set.

    Raises:
        DataError: there are none.
    """
    texts = [index for index, draws in enumerate(data.is_drawn.tolist()) if not draws]
    texts = [index for index in texts if (data.conversations[index].reply or "").strip()]
    if not texts:
        hint = "leave out --eval-metric: a drawn image is judged by the validation loss"
        raise DataError("no reply is a text", place="validation data", hint=hint)
    count = min(most, len(texts))
    chosen = {texts[number * len(texts) // count] for number in range(count)}
    return data.divide(chosen)[1]
