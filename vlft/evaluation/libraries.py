"""Metrics of other packages, which ``vlft[eval]`` installs."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from vlft.errors import ConfigError

ROUGE, BLEU = "rouge_score.rouge_scorer", "sacrebleu"


def rouge_l(reply: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1 (Lin 2004), by rouge-score.

    Without stemming. rouge-score's words are runs of a-z and 0-9: texts of other scripts have none.
    """
    score: float = _rouge().score(reference, reply)["rougeL"].fmeasure
    return score


def sentence_bleu(reply: str, reference: str) -> float:
    """BLEU of a single text, 0 to 1 (Papineni et al. 2002), by sacrebleu's ``sentence_bleu``.

    Its mean over records is not the BLEU of a corpus, which papers report.
    """
    score: float = imported(BLEU, "sentence-bleu").sentence_bleu(reply, [reference]).score
    # The library's own rounding gives 100.00000000000004 for equal texts.
    return min(score / 100, 1.0)


@functools.cache
def _rouge() -> Any:
    scorer = imported(ROUGE, "rouge-l")
    return scorer.RougeScorer(["rougeL"], use_stemmer=False)


def imported(module: str, metric: str) -> Any:
    """The module of a library that a metric needs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0].replace("_", "-")
        raise ConfigError(
            f"{metric} needs {name}", place="--metric", hint="pip install 'vlft[eval]'"
        ) from None
