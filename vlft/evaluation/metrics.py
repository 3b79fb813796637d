"""The table of metrics: a function of a reply and a reference, and how its scores are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vlft.evaluation import boxes, edits, libraries, numbers, text
from vlft.evaluation.captions import cider
from vlft.evaluation.json_fields import json_fields
from vlft.evaluation.tables import teds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Nats whose exponential is still a number.
LARGEST_LOSS = 700.0
# The references of each record.
Corpus: TypeAlias = "Sequence[Sequence[str]]"


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        score: of a reply and a reference. Its docstring says what it is, its range and source. None
            for metrics of a corpus.
        higher_is_better: false for error rates.
        weight: of a reference in the mean over records; without it all have the same.
        library: module that the score imports; empty if it needs none.
        of_fields: of the fields of a result line the score and its weight.
        exponential: whether the score of records is the exponential of the mean.
        of_corpus: from the references of all records the score of a reply and its references.
    """

    score: Callable[[str, str], float] | None
    higher_is_better: bool = True
    weight: Callable[[str], float] | None = None
    library: str = ""
    of_fields: Callable[[Mapping[str, Any]], tuple[float, float]] | None = None
    exponential: bool = False
    of_corpus: Callable[[Corpus], Callable[[str, Sequence[str]], float]] | None = None

    def final(self, means: Any) -> Any:
        """What is reported of means over records, or of the score of one."""
        return np.exp(np.minimum(means, LARGEST_LOSS)) if self.exponential else means

    def scorer(self, corpus: Corpus) -> Callable[[str, Sequence[str]], tuple[float, float]]:
        """``best`` for the records with these references."""
        if self.of_corpus is None:
            return self.best
        score = self.of_corpus(corpus)
        return lambda reply, references: (score(reply, references), 1.0)

    def best(self, reply: str, references: Sequence[str]) -> tuple[float, float]:
        """The score against the reference that fits best, and the weight of that one.

        Raises:
            ValueError: a reference cannot be scored; the text goes on after its name.
        """
        if self.score is None:
            raise ValueError("is scored by vlft eval alone, with those of all records")
        scores = [self.score(reply, reference) for reference in references]
        score = max(scores) if self.higher_is_better else min(scores)
        reference = references[scores.index(score)]
        return score, self.weight(reference) if self.weight else 1.0


def label_loss_of(fields: Mapping[str, Any]) -> tuple[float, float]:
    """The loss of the label and its tokens; perplexity is the exponential of their mean.

    Raises:
        ValueError: the line has none.
    """
    loss, tokens = fields.get("label_loss"), fields.get("label_tokens")
    if not isinstance(loss, int | float) or not isinstance(tokens, int) or not tokens:
        raise ValueError("has no loss: let vlft infer answer with --label-loss")
    return float(loss), float(tokens)


METRICS = {
    "exact-match": Metric(text.exact_match),
    "contains": Metric(text.contains),
    "token-f1": Metric(text.token_f1),
    "cer": Metric(edits.cer, higher_is_better=False, weight=edits.characters),
    "wer": Metric(edits.wer, higher_is_better=False, weight=edits.words),
    "anls": Metric(edits.anls),
    "relaxed-accuracy": Metric(numbers.relaxed_accuracy),
    "json-fields": Metric(json_fields),
    "box-iou": Metric(boxes.box_iou),
    "box-accuracy": Metric(boxes.box_accuracy),
    "box-parsed": Metric(boxes.box_parsed),
    "rouge-l": Metric(libraries.rouge_l, library=libraries.ROUGE),
    "sentence-bleu": Metric(libraries.sentence_bleu, library=libraries.BLEU),
    "cider": Metric(None, of_corpus=cider),
    "teds": Metric(teds),
    "perplexity": Metric(
        None,
        higher_is_better=False,
        of_fields=label_loss_of,
        exponential=True,
        weight=lambda _: 1.0,
    ),
}


def check_libraries(names: Sequence[str]) -> None:
    """Imports what these metrics need.

    Raises:
        ConfigError: a library is not installed.
    """
    for name in names:
        if METRICS[name].library:
            libraries.imported(METRICS[name].library, name)
