"""Settings -> samples, their order, their images. Nothing here needs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.config import JOINED_TOKENS, TOKENS_PER_ROW
from vlft.data.dataset import DataOptions, Dataset, load_train_and_val
from vlft.packing.packer import Packer
from vlft.packing.schedule import Schedule

if TYPE_CHECKING:
    from vlft.config import SftConfig
    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor


def load_data(config: SftConfig, processor: Processor) -> tuple[Dataset, Dataset]:
    """Training and validation set, every record checked."""
    options = DataOptions(
        image_tag=processor.family.image_tag,
        image_token_id=processor.chat.image_token_id,
        image_root=config.image_root,
        on_bad_sample=config.on_bad_sample,
        on_long=config.on_long,
        max_length=min(config.max_length or processor.max_length, processor.max_length),
        seed=config.seed,
    )
    return load_train_and_val(
        config.dataset,
        config.val_dataset,
        config.val_ratio,
        processor.encode_conversation,
        options,
    )


def make_schedule(config: SftConfig, train_data: Dataset) -> Schedule:
    """The order of the samples: those of one image together, unless nothing is shared."""
    groups = tuple(
        outline.images[0].digest if config.share_prefix and outline.images else index
        for index, outline in enumerate(train_data.outlines)
    )
    return Schedule(groups, config.batch_size, config.seed)


def make_packer(
    config: SftConfig, processor: Processor, device: str, world_size: int = 1
) -> Packer:
    """How the samples of a step become rows.

    Args:
        config: of the run.
        processor: of the checkpoint.
        device: cpu or cuda, which decide the default limits.
        world_size: number of ranks.
    """
    return Packer(
        image_token_id=processor.chat.image_token_id,
        tokens_per_row=config.tokens_per_microbatch or TOKENS_PER_ROW[device],
        joined_tokens=JOINED_TOKENS[device],
        share_prefix=config.share_prefix,
        world_size=world_size,
    )


def distinct_images(data: tuple[Dataset, Dataset]) -> list[EncodedImage]:
    """Every image of the samples once, in their order."""
    found = {
        image.key: image for part in data for outline in part.outlines for image in outline.images
    }
    return list(found.values())
