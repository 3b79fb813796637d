"""The ways to train that are compared; all compute the same gradient of the same samples.

plain                         padded batches, the tower for every sample, logits at all positions
plain, checkpointing          the same with gradient checkpointing
vlft, no sharing, no cache    --no-share-prefix --vision-cache off
vlft                          its defaults
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.command import DTYPES, changed
from benchmarks.job import encode_images, make_job, rows_of
from benchmarks.models import MODELS, SCALES, native_config, random_model
from benchmarks.samples import WORKLOADS, random_samples
from vlft.data.encode import IGNORE
from vlft.training.loop import take_gradients
from vlft.training.model import set_checkpointing

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from benchmarks.models import RandomModel
    from benchmarks.samples import Samples
    from vlft.data.encode import EncodedSample
    from vlft.training.job import Job


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        forwards: passes through the LLM in an epoch.
        tokens: that the LLM sees in an epoch, padding included.
        epoch: leaves the gradient in the model, returns the loss in nats per trained token.
        encode: done once, before the first epoch; returns the number of images.
    """

    name: str
    built: RandomModel
    forwards: int
    tokens: int
    epoch: Callable[[], float]
    encode: Callable[[], float] | None = None


def add_job_options(
    parser: argparse.ArgumentParser, *, workloads: Sequence[str] | None, dtype: str | None
) -> None:
    """Adds the options of a job on random models, with these defaults.

    Without default workloads these depend on the model, and without a dtype on the scale.
    """
    add = parser.add_argument
    models, names = list(MODELS), list(WORKLOADS)
    shown = f"of {', '.join(names)}; default: {' '.join(workloads or ('by model',))}"
    add("--models", nargs="+", default=models, choices=models, help="default: all")
    add("--workloads", nargs="+", default=workloads, choices=names, metavar="NAME", help=shown)
    add("--scale", default="middle", choices=SCALES, help="of the models; tiny is a quick look")
    shown = f"of frozen weights; default: {dtype or 'bfloat16, but float32 if tiny'}"
    add("--dtype", default=dtype, choices=DTYPES, help=shown)
    add("--samples", type=int, default=10, help="of an optimiser step; default: 10")


def cases_of(options: argparse.Namespace, model: str) -> list[argparse.Namespace]:
    """The options with the name of a model and of each of its workloads."""
    names = options.workloads or (WORKLOADS if model == "deepseek-vl" else ("q1", "q5", "mixed"))
    return [changed(options, model=model, workload=name) for name in names]


def make_sides(case: argparse.Namespace, batches: Sequence[int]) -> tuple[Samples, list[Side]]:
    """Random samples and all sides on them, plain ones with padded batches of these sizes."""
    plain, _ = make_samples(case, plain=True)
    built, samples = make_samples(case)
    job = make_job(built, samples)
    unshared = make_job(built, samples, share_prefix=False)
    return samples, [
        *(plain_side(plain, samples, size, checkpointing=False) for size in batches),
        plain_side(plain, samples, batches[0], checkpointing=True),
        vlft_side("vlft, no sharing, no cache", built, unshared, samples),
        vlft_side("vlft", built, job, samples, cache=True),
    ]


def make_samples(case: argparse.Namespace, *, plain: bool = False) -> tuple[RandomModel, Samples]:
    """A model with a tower for the workload's images, and its samples."""
    workload = WORKLOADS[case.workload]
    native = native_config(case.model, case.scale, workload.image_size)
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    built = random_model(case.model, native, dtype, device, plain=plain)
    return built, random_samples(workload, built, case.samples)


def vlft_side(
    name: str, built: RandomModel, job: Job, samples: Samples, *, cache: bool = False
) -> Side:
    """vlft's own step, less the optimiser's update."""

    def epoch() -> float:
        return take_gradients(job, rows_of(job)) / samples.targets

    rows = rows_of(job)
    tokens = sum(row.tokens for row in rows)
    encode = partial(encode_images, job, samples) if cache else None
    return Side(name, built, len(rows), tokens, epoch, encode)


def plain_side(built: RandomModel, samples: Samples, size: int, *, checkpointing: bool) -> Side:
    """Transformers and peft, as an experienced user writes it."""
    device, dtype = built.weight.device, built.weight.dtype
    # Samples of similar length together, so that little is padded; the longest first.
    ordered = sorted(samples.samples, key=len, reverse=True)
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def epoch() -> float:
        set_checkpointing(built.model, on=checkpointing)
        total = 0.0
        for batch in batches:
            # As Accelerate computes with a model in 16 bit.
            with torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
                loss = padded_loss(built, samples, batch) / samples.targets
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    name = f"plain{f', batches of {size}' * (size > 1)}{', checkpointing' * checkpointing}"
    tokens = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return Side(name, built, len(batches), tokens, epoch)


def padded_loss(built: RandomModel, samples: Samples, batch: list[EncodedSample]) -> Tensor:
    """Sum of the losses of a batch, in nats, from logits at all of its positions."""
    device = built.weight.device
    ids = pad_sequence([sample.input_ids for sample in batch], batch_first=True)
    mask = pad_sequence([torch.ones_like(s.input_ids) for s in batch], batch_first=True)
    labels = pad_sequence([s.labels for s in batch], batch_first=True, padding_value=IGNORE)
    # Padding is on the right: positions, which the model counts from the left, are the samples'.
    logits = built.tuned(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        use_cache=False,
        **samples.processor.image_inputs([image for s in batch for image in s.images]),
    ).logits
    # As transformers shifts: the labels move, so that the logits need not be copied.
    following = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].to(device)
    return F.cross_entropy(
        logits.float().flatten(0, 1), following.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def clear_gradient(side: Side) -> Tensor:
    """All LoRA gradients of a side as one vector on the CPU, after which they are cleared."""
    found = [p.grad.flatten() for p in side.built.tuned.parameters() if p.grad is not None]
    vector = torch.cat(found).cpu()
    side.built.tuned.zero_grad()
    return vector
