"""Settings -> samples, their order, their rows, their images. Nothing here needs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.config import JOINED_TOKENS, TOKENS_PER_ROW
from vlft.console import warn
from vlft.data.dataset import Dataset, load_train_and_val
from vlft.data.mix import sources_of
from vlft.data.options import DataOptions, History
from vlft.data.split import read_history
from vlft.errors import raise_all
from vlft.packing.dropout import PromptDropout
from vlft.packing.packer import Packer
from vlft.packing.planner import Planner
from vlft.packing.schedule import Schedule
from vlft.settings import broken_rules
from vlft.training.job import LoopOptions
from vlft.training.mixing import check_mix, make_draw, mix_rows, show_mix

if TYPE_CHECKING:
    from pathlib import Path

    from vlft.config import SftConfig
    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor


def load_data(
    config: SftConfig, processor: Processor, run: Path | None = None
) -> tuple[Dataset, Dataset]:
    """Training and validation set, every record checked.

    Args:
        config: of the run.
        processor: of the checkpoint.
        run: the run folder to go on in; its validation records stay what they are.
    """
    # A number too many is said before the data is read.
    sources_of(config.dataset, config.mix)
    longest = processor.max_length
    if (config.max_length or 0) > longest:
        warn(f"--max-length {config.max_length}: the model takes at most {longest} tokens a sample")
    options = DataOptions(
        reading=processor.reading(config),
        image_root=config.image_root,
        confine_images=config.confine_images,
        allow_private_urls=config.allow_private_urls,
        rotate=processor.pixels.rotate,
        on_bad_sample=config.on_bad_sample,
        on_long=config.on_long,
        max_length=min(config.max_length or longest, longest),
        model_length=longest,
        seed=config.seed,
        history=History() if run is None else read_history(run),
    )
    encoder = processor.encoder
    train, val = load_train_and_val(
        config.dataset, config.val_dataset, config.val_ratio, encoder, options
    )
    if config.image_root is not None and not distinct_images((train, val)):
        warn("--image-root has no effect: the data holds no images")
    # Few samples leave nothing to split off. A run that an older version began so can go on.
    if config.resume is None:
        raise_all(broken_rules([config.lacks_validation(val)]))
    check_mix(config, train)
    show_mix(mix_rows(config, train))
    return train, val


def make_schedule(config: SftConfig, train_data: Dataset) -> Schedule:
    """The order of the samples; if prefixes are shared, those of one first image together."""
    groups = train_data.groups() if config.share_prefix else range(len(train_data))
    draw = make_draw(config, train_data)
    return Schedule(groups, config.batch_size, config.seed, draw)


def make_planner(
    config: SftConfig,
    processor: Processor,
    train_data: Dataset,
    device: str,
    world_size: int = 1,
) -> Planner:
    """The rows of every step.

    Args:
        config: of the run.
        processor: of the checkpoint.
        train_data: training samples.
        device: cpu or cuda, which decides the default limits of a row.
        world_size: number of ranks.
    """
    packer = Packer(
        image_token_id=processor.chat.image_token_id,
        tokens_per_row=config.tokens_per_microbatch or TOKENS_PER_ROW[device],
        joined_tokens=JOINED_TOKENS[device],
        share_prefix=config.share_prefix,
        world_size=world_size,
    )
    dropout = PromptDropout(config.cfg_dropout, config.seed, processor.chat.pad_id)
    return Planner(make_schedule(config, train_data), packer, train_data.outlines, dropout)


def loop_options(config: SftConfig, schedule: Schedule) -> LoopOptions:
    """The settings of the loop with every default resolved."""
    save_steps = config.save_steps or schedule.steps_per_epoch
    return LoopOptions(
        total_steps=config.total_steps(schedule.steps_per_epoch),
        batch_size=config.batch_size,
        save_steps=save_steps,
        eval_steps=config.eval_steps or save_steps,
        logging_steps=config.logging_steps,
        early_stop=config.early_stop,
    )


def distinct_images(data: tuple[Dataset, Dataset]) -> list[EncodedImage]:
    """Every distinct image that the samples show or draw, in their order."""
    return list({image.key: image for part in data for image in part.images()}.values())
