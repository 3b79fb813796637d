"""Where a run stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlft.evaluation.judge import Verdict


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        best_loss: validation loss of the best checkpoint so far, in nats per token: the lowest, or
            that of the best score.
        best_score: its score by --eval-metric; None without one.
        best_step: the step at which it was measured.
        evaluations_without_best: evaluations since then.
        last_loss: validation loss of the last evaluation.
        last_score: its score by --eval-metric.
        evaluated_step: the step at which it was measured.
        finished: whether the run ends here.
        window: what progress.Window has summed up since the last log line.
        scheduler: state of the learning rate scheduler.
        scaler: state of the gradient scaler; empty without one.
    """

    step: int = 0
    best_loss: float | None = None
    best_score: float | None = None
    best_step: int | None = None
    evaluations_without_best: int = 0
    last_loss: float | None = None
    last_score: float | None = None
    evaluated_step: int | None = None
    finished: bool = False
    window: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    def note(self, loss: float, verdict: Verdict | None) -> bool:
        """Notes an evaluation at this step; returns whether it is the best so far.

        Of equal ones the first is the best.

        Args:
            loss: of the validation set.
            verdict: on the answers, which then decides.
        """
        self.evaluated_step = self.step
        self.last_loss = loss if math.isfinite(loss) else None
        self.last_score = None if verdict is None else verdict.score
        # There is no checkpoint of the untrained model.
        counts = self.step > 0
        if verdict is None:
            best = self.best_loss
            is_best = math.isfinite(loss) and (best is None or loss < best)
        else:
            best = self.best_score
            is_best = best is None or verdict.is_better_than(best)
        is_best = is_best and counts
        if is_best:
            self.best_loss, self.best_score = self.last_loss, self.last_score
            self.best_step = self.step
        self.evaluations_without_best = (
            0 if is_best else self.evaluations_without_best + int(counts)
        )
        return is_best
