"""``--eval-metric``: the judge of a run, and what its answers show at the end."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from vlft import console
from vlft.evaluation.kept_answers import answers_table, by_change, read_answers_at
from vlft.evaluation.own import name_of

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset
    from vlft.evaluation.judge import Judge
    from vlft.families.processor import Processor
    from vlft.training.backend import Backend
    from vlft.training.model import TunedModel
    from vlft.training.position import Position
    from vlft.vision.cache import Images


def judged_records(config: SftConfig, val: Dataset) -> Dataset | None:
    """The validation records that are answered; None without --eval-metric.

    Raises:
        DataError: none has a text to compare with.
    """
    if config.eval_metric is None or not val:
        return None
    # Only here, so that other runs do not wait for the modules of inference.
    from vlft.evaluation.judge import choose

    return choose(val, config.eval_samples)


def make_judge(
    config: SftConfig,
    processor: Processor,
    model: TunedModel,
    val: Dataset,
    images: Images,
    backend: Backend,
) -> Judge | None:
    """The judge of a run; None without --eval-metric.

    Raises:
        UsageError: the metric cannot be used, or a label by it.
    """
    records = judged_records(config, val)
    if records is None or config.eval_metric is None:
        return None
    from vlft.evaluation.judge import Judge, Seen

    seen = Seen("aligned", {}) if images.stage == "pixels" else Seen(images.stage, images.features)
    # Weights that train fully are float32, and autocast is what makes them 16 bit.
    autocast = backend.accelerator.autocast if config.tuner == "full" else nullcontext
    count = f"{len(records)} validation records are answered at each evaluation"
    console.info(f"{name_of(config.eval_metric)}: {count}")
    return Judge(
        config.eval_metric,
        model.module if model.peft is None else model.peft,
        processor,
        records,
        seen,
        backend.world,
        autocast,
    )


def show_answers(config: SftConfig, run: Path, position: Position) -> None:
    """Prints base and tuned answers of some records, if the run has any."""
    if config.eval_metric is None:
        return
    step = position.best_step or position.step
    base, tuned = read_answers_at(run, 0), read_answers_at(run, step)
    if base and tuned:
        console.info(f"answers of base and checkpoint-{step}, first those whose score changed most")
        console.err.print(answers_table(by_change(base, tuned), name_of(config.eval_metric)))
