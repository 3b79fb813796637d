"""Settings of vlft eval."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.inference import InferConfig
from vlft.config.shared import makers
from vlft.settings import Rule, given

if TYPE_CHECKING:
    from collections.abc import Sequence

# The keys of ``vlft.evaluation.metrics.METRICS``, which imports more than the command line may.
METRIC_NAMES = (
    "exact-match", "contains", "token-f1", "cer", "wer", "anls", "relaxed-accuracy", "json-fields",
    "box-iou", "box-accuracy", "box-parsed", "rouge-l", "sentence-bleu", "cider",
    "teds", "perplexity",
)  # fmt: skip

_scoring, _generation = makers("Scoring", "Generation")


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class EvalConfig(InferConfig):
    """Settings of ``vlft eval``: those of the answers, and how they are scored."""

    seed: int = _generation(42, "Random seed of sampling and of resampling.", minimum=0)

    results: tuple[Path, ...] = _scoring(
        (), "Result files of vlft infer. Of two the first is the base. One and a data set compare "
        "the model's answers with it.")
    metric: tuple[str, ...] = _scoring(
        ("exact-match",), "What is scored, or your own Python file with a function "
        "score(reply, reference). Repeatable.",
        choices=(*METRIC_NAMES, "FILE.py"), default_text="exact-match")
    references: str = _scoring(
        "label", "Column of the result files with the right text or a list of them, the best of "
        "which counts; meta.answers is a field of meta.")
    json: bool = _scoring(False, "Print the summary as JSON.")

    @property
    def answers_data(self) -> bool:
        """Whether a model answers records first."""
        return self.load_dataset_config or bool(self.dataset or self.image)

    def rules(self) -> Sequence[Rule]:
        """Those of the answers, if there are any to be made, and those of scoring."""
        of_answers = [field.name for field in fields(InferConfig) if field.name != "seed"]
        unused = given(self, *of_answers)
        files = len(self.results) + self.answers_data
        return (
            (not files, "vlft eval", "nothing to score",
             "add --ckpt-dir RUN --load-dataset-config, --dataset FILE, or --results FILE"),
            (files > 2, "--results", f"found {files} sets of answers, one or two are allowed",
             "compare two at a time"),
            (len(self.ckpt_dir) > 1 and self.results, "--results",
             "found together with several --ckpt-dir", "compare two at a time"),
            (len(self.ckpt_dir) > 2, "--ckpt-dir",
             f"found {len(self.ckpt_dir)}, one or two are compared", "compare two at a time"),
            (self.image, "--image", "found documents, whose right text is not known",
             "write them into a data file with responses, and name it with --dataset"),
            (not self.answers_data and files and unused, unused,
             "only for answers to a data set, found --results alone",
             "leave it out, or add --dataset or --load-dataset-config"),
            (self.json, given(self, "show_samples"), "--json prints the summary alone", None),
            *(rule for rule in super().rules() if self.answers_data and rule[3] is not None),
        )
