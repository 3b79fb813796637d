"""``vlft sft`` from top to bottom.

    settings -> data -> backend -> model -> images -> job -> autotune -> loop -> close

Each stage takes what the stages before it made. The settings that are saved are those after the
autotuner: from then on nothing in them changes.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState

from vlft import console
from vlft.checkpoints.data_files import check_same_data
from vlft.checkpoints.runs import (
    new_run_folder,
    sweep,
    write_run_config,
)
from vlft.data.split import write_split
from vlft.errors import VlftError, raise_all, shown
from vlft.evaluation.own import name_of
from vlft.locks import locked
from vlft.models.adaptations import restore
from vlft.models.compiled import compile_layers
from vlft.report.runs import write_run_report
from vlft.settings import to_json
from vlft.training.accelerator import start_backend
from vlft.training.autotune import autotune
from vlft.training.checkpointer import Checkpointer
from vlft.training.course import check_course, go_on
from vlft.training.failures import failing, remove_run, removed_if_idle
from vlft.training.images import prepare_images
from vlft.training.job import Job
from vlft.training.judging import judged_records, make_judge, show_answers
from vlft.training.loop import train
from vlft.training.loss import PackedLoss
from vlft.training.mixing import mix_rows, write_mix
from vlft.training.model import prepare_model, uses_compiler
from vlft.training.optim import make_optimizer, make_scheduler
from vlft.training.plots import plot_run
from vlft.training.position import Position
from vlft.training.preview import introduce
from vlft.training.progress import RunLog, closing_lines
from vlft.training.provenance import (
    changes,
    record_changes,
    write_findings,
    write_provenance,
)
from vlft.training.resume import drop_later_checkpoints
from vlft.training.samples import load_data, loop_options, make_planner, make_schedule
from vlft.training.setup import check_settings
from vlft.training.state import cut_metrics
from vlft.training.trackers import start_trackers
from vlft.vision.cache import Images, release_towers

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset
    from vlft.training.backend import Backend
    from vlft.training.resume import Resumed
    from vlft.training.setup import Setup


# In a run folder, while it is written to.
LOCK = ".lock"


@dataclass(frozen=True)
class SftResult:
    """What a run leaves.

    Attributes:
        run: the run folder.
        checkpoint: the last checkpoint.
        step: optimiser steps done.
        finished: False if it was interrupted.
        best_loss: validation loss of the best checkpoint, nats per token; None without validation.
        best_score: its score by --eval-metric; None without one.
    """

    run: Path
    checkpoint: Path
    step: int
    finished: bool
    best_loss: float | None
    best_score: float | None = None


def run_sft(config: SftConfig, explicit: Collection[str] | None = None) -> SftResult:
    """Trains and returns what was made.

    Args:
        config: all settings.
        explicit: names of those that the user wrote, which matters to ``--resume``; None takes
            those that differ from their defaults.

    Raises:
        VlftError: see errors.py; bad input is a UsageError, raised before the model is loaded.
    """
    setup = check_settings(config, explicit)
    resumed = None if setup.resumed is None else setup.resumed.run
    data = load_data(setup.config, setup.processor, resumed)
    judged_records(setup.config, data[1])
    setup = _checked_unchanged(setup, data)
    backend = start_backend(setup.config, setup.placement)
    try:
        with ExitStack() as held:
            result = _train(setup, data, backend, held)
        # Wrappers of the model must be gone on all ranks before the process group is.
        backend.accelerator.free_memory()
        backend.world.barrier()
        backend.accelerator.end_training()
        return result
    finally:
        # The next run of this process may want another precision or device.
        AcceleratorState._reset_state(reset_partial_state=True)
        console.err.quiet = False


def _checked_unchanged(setup: Setup, data: tuple[Dataset, Dataset]) -> Setup:
    """The setup with the accepted changes of base and images since a resumed run was started.

    Raises:
        UsageError: something has changed, and that is not accepted.
    """
    if setup.resumed is None:
        return setup
    run, config = setup.resumed.run, setup.config
    check_same_data(run, [*config.dataset, *config.val_dataset])
    changed = changes(run, config, setup.folder, data)
    if not config.accept_changes:
        raise_all(changed)
    for change in changed:
        console.warn(f"{change.place}: {change.message}; going on, as asked")
    if setup.resumed.asked:
        steps = make_schedule(config, data[0]).steps_per_epoch
        check_course(config, setup.resumed, steps)
    return dataclasses.replace(setup, changed=tuple(changed))


def _train(
    setup: Setup, data: tuple[Dataset, Dataset], backend: Backend, held: ExitStack
) -> SftResult:
    """Model, images, job, autotune, loop; ``held`` takes the lock on the run folder."""
    config = setup.config
    torch.manual_seed(config.seed)
    model = prepare_model(config, setup.folder, setup.placement, setup.checkpoint)
    introduce(config, model.module, setup.folder, setup.processor, data)
    images = prepare_images(config, setup.processor, model.module, data, backend)
    job, position = _prepare_job(setup, model.module, data, images, backend)
    judge = make_judge(config, setup.processor, model, data[1], images, backend)
    job = dataclasses.replace(job, judge=judge)
    if images.stage != "pixels" and not backend.world.shards_weights:
        # Not earlier: Accelerate has just put the whole model on the device.
        release_towers(model.module, setup.processor)
    if setup.placement.device.type == "cuda":
        config, job = autotune(config, job)
    if uses_compiler(config, setup.placement, backend.world, job.options.total_steps):
        console.info("the LLM's layers are compiled in step one (--compile off leaves it out)")
        compile_layers(model.module.get_submodule(setup.folder.family.parts.language))
    run = _open_run(setup, config, data, position, backend, held)
    checkpointer = Checkpointer(run, config, setup.folder, model, backend)
    started, first = time.perf_counter(), position.step
    with removed_if_idle(run, writes=backend.world.is_rank_zero), failing(run):
        position, problem = train(job, position, checkpointer, _open_log(job, run, position))
        backend.world.on_rank_zero(lambda: _show_run(run, trained=position.step > first))
        backend.world.on_rank_zero(lambda: show_answers(config, run, position))
    # What is left of the model is transformers' own.
    restore(model.module)
    draws = all(part.is_drawn.all() for part in data)
    result = _close(config, run, position, time.perf_counter() - started, draws=draws)
    backend.world.end_if(problem)
    return result


def _prepare_job(
    setup: Setup, model: Any, data: tuple[Dataset, Dataset], images: Images, backend: Backend
) -> tuple[Job, Position]:
    """The job, and the position it starts from."""
    config, world = setup.config, backend.world
    device = setup.placement.device.type
    planner = make_planner(config, setup.processor, data[0], device, world.size)
    options = loop_options(config, planner.schedule)
    if config.learning_rate is None:
        raise ValueError("check_settings resolves the learning rate")
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    scheduler = make_scheduler(
        optimizer, config.lr_scheduler, options.total_steps, config.warmup_ratio
    )
    if setup.resumed is None and not world.is_rank_zero:
        # All ranks start from the same weights, but each draws its own dropout.
        torch.manual_seed(config.seed + 1009 * world.rank)
    backend.prepare(PackedLoss(model, setup.folder.family), optimizer, scheduler)
    # Not earlier: of sharded weights each rank takes its shard of the moments.
    position = Position()
    if setup.resumed is not None:
        position = go_on(config, setup.resumed, backend, options)
    base = shown(setup.folder.path)
    return Job(backend, images, data[0], data[1], planner, options, base=base), position


def _open_run(
    setup: Setup,
    config: SftConfig,
    data: tuple[Dataset, Dataset],
    position: Position,
    backend: Backend,
    held: ExitStack,
) -> Path:
    """The run folder: a new one with settings and provenance, or the resumed one, cut back."""

    def begin(run: Path) -> None:
        with failing(run):
            held.enter_context(locked(run / LOCK, run))
            write_split(run, () if config.val_dataset else data[1].positions)
            write_provenance(run, config, setup.folder, data)
            write_findings(run, data)
            write_mix(run, mix_rows(config, data[0]))
            write_run_config(run, to_json(config))

    def reopen(resumed: Resumed) -> None:
        run = resumed.run
        with failing(run):
            held.enter_context(locked(run / LOCK, run))
            sweep(run)
            drop_later_checkpoints(run, position.step, overwrite=config.overwrite)
            cut_metrics(run, position.step)
            if setup.changed or resumed.asked:
                record_changes(run, setup.changed, resumed, setup.folder, data)
            if config != setup.config or resumed.asked:
                write_run_config(run, to_json(config))

    def prepare() -> Path:
        if setup.resumed is not None:
            reopen(setup.resumed)
            return setup.resumed.run
        run = new_run_folder(config.output_dir, setup.model_name)
        with ExitStack() as undo:
            undo.callback(remove_run, run)
            begin(run)
            undo.pop_all()
        return run

    run = backend.world.on_rank_zero(prepare)
    start_trackers(backend.accelerator, config, run, position.step)
    return run


def _open_log(job: Job, run: Path, position: Position) -> RunLog:
    accelerator = job.backend.accelerator
    trackers = accelerator if accelerator.trackers else None
    writes = job.backend.world.is_rank_zero
    return RunLog(run, job.options.total_steps, position.step, trackers, writes=writes)


def _show_run(run: Path, *, trained: bool) -> None:
    """Writes the curves of a run, and its report if there is something new to tell.

    A file that is damaged costs the report, not the run: its checkpoints are whole.
    """
    plot_run(run)
    if trained:
        try:
            write_run_report(run)
        except VlftError as error:
            console.warn(f"no report of the run: {error.place}: {error.message}")


def _close(
    config: SftConfig, run: Path, position: Position, seconds: float, *, draws: bool
) -> SftResult:
    metric = name_of(config.eval_metric or "")
    for line in closing_lines(run, position, seconds, draws=draws, metric=metric):
        console.info(line)
    checkpoint = run / f"checkpoint-{position.step}"
    best = position.best_loss, position.best_score
    return SftResult(run, checkpoint, position.step, position.finished, *best)
