"""What a run shows before step one: the model by parts, and one encoded sample."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from vlft import console
from vlft.data.encode import IGNORE, EncodedSample
from vlft.errors import printable, shown
from vlft.families.base import is_in

if TYPE_CHECKING:
    from vlft.checkpoints.locate import ModelFolder
    from vlft.config import SftConfig
    from vlft.data.dataset import Dataset
    from vlft.families.base import Parts
    from vlft.families.processor import Processor


def introduce(
    config: SftConfig,
    model: nn.Module,
    folder: ModelFolder,
    processor: Processor,
    data: tuple[Dataset, Dataset],
) -> None:
    """Shows the model by parts, the size of the data, and one encoded sample."""
    console.info(f"{folder.family.title} from {shown(folder.path)} ({folder.layout} layout)")
    console.err.print(parts_table(model, folder.family.parts))
    console.info(f"{len(data[0])} training samples, {len(data[1])} validation samples")
    if config.show_sample:
        colour = console.err.is_terminal
        console.info(f"one encoded sample, trained tokens {'in green' if colour else 'in ⟦ ⟧'}:")
        # A terminal gets whole words in its width; a log file gets the text's own lines.
        text = _sample_text(data[0][0], processor, marks=not colour)
        console.err.print(text, soft_wrap=not colour)


def _sample_text(sample: EncodedSample, processor: Processor, *, marks: bool = False) -> Text:
    """The decoded tokens of a sample, trained ones in green, an image as its tag and token count.

    A drawn image is the number of its codes.

    Without colours, ``marks`` puts double brackets around the trained tokens.
    """
    chat = processor.chat
    text = Text()
    is_image = sample.input_ids == chat.image_token_id
    is_trained = sample.labels != IGNORE
    if sample.drawn:
        is_trained[-sample.drawn.tokens :] = True
    kinds = zip(is_image.tolist(), is_trained.tolist(), strict=True)
    start = 0
    # Neighbours of one kind are decoded together, as a character may take several tokens.
    for (image, trained), group in itertools.groupby(kinds):
        end = start + len(list(group))
        ids = sample.input_ids[start:end].tolist()
        piece = printable(processor.text(ids), keep="\n\t")
        if image and trained:
            piece = f"{len(ids) + 1} codes"
        if image and not trained:
            text.append(f"{chat.image_tag}x{len(ids)}", style="magenta")
        elif trained:
            text.append(f"⟦{piece}⟧" if marks else piece, style="bold green")
        else:
            text.append(piece, style="dim")
        start = end
    return text


def parts_table(model: nn.Module, parts: Parts) -> Table:
    """A row per part of the model: parameters, trained ones, dtypes, memory."""
    table = Table(title="Model", title_justify="left", box=None, pad_edge=False)
    for column in ("part", "parameters", "trained", "dtype", "memory"):
        table.add_column(column, justify="left" if column in ("part", "dtype") else "right")
    places = {part: [p] if isinstance(p, str) else p for part, p in asdict(parts).items() if p}
    rows: dict[str, list[nn.Parameter]] = {part: [] for part in places}
    for name, parameter in model.named_parameters():
        rows[next(part for part in rows if is_in(name, places[part]))].append(parameter)
    for part, parameters in rows.items():
        table.add_row(part, *_summary(parameters))
    table.add_section()
    table.add_row("all", *_summary([p for group in rows.values() for p in group]))
    return table


def parameter_count(parameter: nn.Parameter) -> int:
    """Weights of the parameter; in 4 bit, a byte holds two of them."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def _summary(parameters: list[nn.Parameter]) -> tuple[str, str, str, str]:
    total = sum(parameter_count(p) for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    dtypes = sorted({_dtype_name(p) for p in parameters})
    memory = sum(p.numel() * p.element_size() for p in parameters) / 2**20
    return f"{total:,}", f"{trained:,}", ", ".join(dtypes), f"{memory:,.1f} MiB"


def _dtype_name(parameter: nn.Parameter) -> str:
    state = getattr(parameter, "quant_state", None)
    return state.quant_type if state is not None else str(parameter.dtype).removeprefix("torch.")
