"""The records that ``vlft infer`` answers."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vlft.checkpoints.data_files import check_same_data
from vlft.checkpoints.runs import PROVENANCE
from vlft.console import warn
from vlft.data.dataset import Dataset, load_dataset, load_train_and_val
from vlft.data.documents import Pages, keep_documents
from vlft.data.image_notes import warn_of_images
from vlft.data.options import DataOptions
from vlft.data.source import idle_flags
from vlft.data.special_tokens import warn_of_special_tokens
from vlft.data.specs import parse_spec
from vlft.data.split import read_history
from vlft.errors import ConfigError, raise_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlft.checkpoints.tuned import Tuned
    from vlft.config import DrawConfig, InferConfig
    from vlft.data.documents import Document
    from vlft.families.processor import Processor


def load_records(
    config: InferConfig,
    tuned: Tuned | None,
    processor: Processor,
    documents: Sequence[Document],
) -> Dataset | None:
    """The records to answer; None for a chat."""
    options = DataOptions(
        reading=processor.reading(config, need_response=False),
        image_root=config.image_root,
        confine_images=config.confine_images,
        allow_private_urls=config.allow_private_urls,
        rotate=processor.pixels.rotate,
        on_bad_sample=config.on_bad_sample,
        max_length=processor.max_length - 1,
        seed=config.seed,
    )
    files: Sequence[str] = config.dataset
    if documents:
        query = (config.query or "").replace("\\n", "\n")
        check_together(config.pages_per_prompt, processor)
        files = [keep_documents(documents, query, config.pages_per_prompt)]
    if files:
        # Pages of PDF files are drawn one batch at a time, once their turn comes.
        inspected = Pages(documents).inspected
        data = load_dataset(files, processor.encoder, options, inspected)
        raise_all(idle_flags(data.flags, options.reading))
        warn_of_images(data.with_notes())
        warn_of_special_tokens(data.as_text)
        return data
    if not config.load_dataset_config or tuned is None:
        if sys.stdin is None:
            raise ConfigError(
                "found no data set, and no standard input for a chat",
                place="vlft infer",
                hint="add --dataset",
            )
        return None
    return _without_drawings(validation_set(config, tuned, processor, options))


def check_together(pages: int, processor: Processor) -> None:
    """Raises ConfigError if a prompt of so many pages has no form."""
    family = processor.family
    if pages > 1 and family.template is None and not family.several_images:
        found = f"found {pages}; {family.title} was trained on one page"
        raise ConfigError(found, place="--pages-per-prompt", hint="leave it out")


def validation_set(
    config: InferConfig | DrawConfig, tuned: Tuned, processor: Processor, options: DataOptions
) -> Dataset:
    """The records that the run of a checkpoint was validated on.

    Raises:
        ConfigError: there are none, or the checkpoint is not in its run.
    """
    run, encoder = tuned.settings, processor.encoder
    if not run.dataset or (tuned.run is None and not run.val_dataset):
        raise ConfigError(
            f"{tuned.checkpoint} is not in its run, which knows its validation records",
            place="--load-dataset-config",
            hint="name a checkpoint-N of the run, or a file with --dataset",
        )
    if tuned.checkpoint.with_name(PROVENANCE).is_file():
        check_same_data(tuned.checkpoint.parent, [*run.dataset, *run.val_dataset])
    options = replace(
        options,
        image_root=config.image_root or run.image_root,
        confine_images=config.confine_images or run.confine_images,
        allow_private_urls=config.allow_private_urls or run.allow_private_urls,
        reading=processor.reading(run),
        on_bad_sample=run.on_bad_sample,
        on_long=run.on_long,
        max_length=min(run.max_length or processor.max_length, processor.max_length),
        seed=run.seed,
        history=read_history(tuned.checkpoint.parent),
        only_validation=not run.val_dataset,
    )
    # What is drawn from a file for validation depends on what was drawn from it for training.
    is_drawn = any(parse_spec(spec)[1] for spec in (*run.dataset, *run.val_dataset))
    files = () if run.val_dataset and not is_drawn else run.dataset
    _, val = load_train_and_val(files, run.val_dataset, run.val_ratio, encoder, options)
    if not len(val):
        raise ConfigError(
            "the run has no validation set",
            place="--load-dataset-config",
            hint="name a file with --dataset",
        )
    return val


def _without_drawings(data: Dataset) -> Dataset:
    """The records whose reply is text.

    Raises:
        ConfigError: there is none.
    """
    drawings = np.flatnonzero(data.is_drawn).tolist()
    if not drawings:
        return data
    if len(drawings) == len(data):
        hint = "vlft draw --ckpt-dir CHECKPOINT --load-dataset-config draws them"
        raise ConfigError(
            "all replies of the validation set are images", place="--load-dataset-config", hint=hint
        )
    warn(f"{len(drawings)} records whose reply is an image are left out; vlft draw draws such")
    return data.divide(drawings)[0]
