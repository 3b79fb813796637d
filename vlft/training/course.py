"""The course of a resumed run: where it ends, and its learning rate from here on.

As in transformers' Trainer the learning rate is that of the new total of steps, as if the run had
had it from the beginning: an extended run goes on like one of that length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.errors import ConfigError
from vlft.settings import flag
from vlft.training.state import read_state

if TYPE_CHECKING:
    from vlft.config import SftConfig
    from vlft.training.backend import Backend
    from vlft.training.job import LoopOptions
    from vlft.training.position import Position
    from vlft.training.resume import Resumed


def check_course(config: SftConfig, resumed: Resumed, steps_per_epoch: int) -> None:
    """Raises ConfigError if a run is asked to end before the step that it goes on from."""
    total = config.total_steps(steps_per_epoch)
    if total < resumed.step:
        name = "max_steps" if config.max_steps else "num_train_epochs"
        found = f"found {getattr(config, name)}"
        raise ConfigError(
            f"{found if config.max_steps else f'{found}, {total} steps'}; {resumed.step} are done",
            place=flag(name),
            hint="ask for more, or go on from an earlier checkpoint with --overwrite",
        )


def go_on(config: SftConfig, resumed: Resumed, backend: Backend, options: LoopOptions) -> Position:
    """Restores the state of a run, puts it on its new course if there is one, and says which.

    Raises:
        CheckpointError: see read_state.
    """
    position = read_state(resumed.checkpoint, backend, new_course=bool(resumed.changed))
    patience = options.early_stop
    stopped = patience is not None and position.evaluations_without_best >= patience
    if resumed.changed:
        position.finished = stopped or position.step >= options.total_steps
        changes = ", ".join(
            f"{flag(name)} {_text(old)} -> {_text(new)}"
            for name, (old, new) in resumed.changed.items()
        )
        console.info(f"going on after step {position.step} of {options.total_steps}: {changes}")
    if position.finished:
        more = "--early-stop" if stopped else "--num-train-epochs or --max-steps"
        console.info(f"the run is finished; a larger {more} extends it")
    elif resumed.changed:
        rate, name = backend.scheduler.get_last_lr()[0], config.lr_scheduler
        shape = f"{name} over all {options.total_steps} steps, warm-up {config.warmup_ratio:g}"
        console.info(f"learning rate {rate:.2e} in step {position.step + 1}: {shape}")
    return position


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
