"""The ways to train that are compared; all compute the same gradient of the same samples.

strong                        an expert's loop over transformers and peft: padded batches of samples
                              of similar length, the tower for every sample, logits at targets only
strong, features kept         the same, with the features of each image computed once
all logits                    strong, but with logits at all positions
vlft, no sharing, no cache    --no-share-prefix --vision-cache off
vlft                          its defaults
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.command import DTYPES, changed
from benchmarks.job import encode_images, make_job, rows_of
from benchmarks.models import MODELS, SCALES, native_config, random_model
from benchmarks.samples import WORKLOADS, random_samples
from vlft.data.encode import IGNORE
from vlft.families.base import encode_images as encode_features
from vlft.training.loop import take_gradients

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from benchmarks.models import RandomModel
    from benchmarks.samples import Samples
    from vlft.data.encode import EncodedImage, EncodedSample
    from vlft.training.job import Job


OtherSide: TypeAlias = "Callable[[argparse.Namespace], Side]"


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
    names = options.workloads or (
        WORKLOADS if model == "deepseek-vl" else ("q1", "q5", "caption", "mixed")
    )
    return [changed(options, model=model, workload=name) for name in names]


def make_sides(
    case: argparse.Namespace, batches: Sequence[int], other: OtherSide | None = None
) -> tuple[Samples, list[Side]]:
    """Random samples and all sides on them, the strong loop with padded batches of these sizes.

    ``other`` makes an additional side. vlft with its defaults is the last one.
    """
    plain, _ = make_samples(case, plain=True)
    built, samples = make_samples(case)
    job = make_job(built, samples)
    unshared = make_job(built, samples, share_prefix=False)
    return samples, [
        *(Loop(plain, samples, size).side("strong") for size in batches),
        Loop(plain, samples, 1, keeps_features=True).side("strong, features kept"),
        Loop(plain, samples, 1, all_logits=True).side("all logits"),
        *([other(case)] if other else []),
        vlft_side("vlft, no sharing, no cache", built, unshared, samples),
        vlft_side("vlft", built, job, samples, cache=True),
    ]


def make_samples(case: argparse.Namespace, *, plain: bool = False) -> tuple[RandomModel, Samples]:
    """A model with a tower for the workload's images, and its samples."""
    built = make_model(case, plain=plain)
    return built, random_samples(WORKLOADS[case.workload], built, case.samples)


def make_model(case: argparse.Namespace, *, plain: bool = False) -> RandomModel:
    """A model with a tower for the workload's images."""
    native = native_config(case.model, case.scale, WORKLOADS[case.workload].image_size)
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    return random_model(case.model, native, dtype, device, plain=plain)


def vlft_side(
    name: str, built: RandomModel, job: Job, samples: Samples, *, cache: bool = False
) -> Side:
    """vlft's own step, less the optimiser's update."""

    def epoch() -> float:
        return take_gradients(job, rows_of(job)).total / samples.targets

    rows = rows_of(job)
    tokens = sum(row.tokens for row in rows)
    encode = partial(encode_images, job, samples) if cache else None
    return Side(name, built, len(rows), tokens, epoch, encode)


@dataclass
class Loop:
    """A loop over transformers and peft.

    Attributes:
        built: a plain model.
        size: samples of a padded batch.
        keeps_features: whether the tower runs once for each distinct image.
        all_logits: whether logits are computed where there is no target too.
    """

    built: RandomModel
    samples: Samples
    size: int
    keeps_features: bool = False
    all_logits: bool = False
    features: dict[str, Tensor] = field(default_factory=dict)

    def side(self, name: str) -> Side:
        """The loop as one of the sides that are compared."""
        batches = self.batches()
        name += f", batches of {self.size}" * (self.size > 1)
        tokens = sum(len(batch) * max(map(len, batch)) for batch in batches)
        encode = self.encode if self.keeps_features else None
        return Side(name, self.built, len(batches), tokens, self.epoch, encode)

    def batches(self) -> list[list[EncodedSample]]:
        """Samples of similar length together, so that little is padded; the longest first."""
        ordered = sorted(self.samples.samples, key=len, reverse=True)
        return [ordered[i : i + self.size] for i in range(0, len(ordered), self.size)]

    def encode(self) -> int:
        """Computes and stores the features of every image; returns how many."""
        built = self.built
        with torch.no_grad():
            for image in self.samples.images:
                inputs = self.samples.processor.image_inputs([image])
                found = encode_features(built.family, built.model, inputs, [built.tiles])
                self.features[image.key] = found
        return len(self.features)

    def epoch(self) -> float:
        """Leaves the gradient in the model, returns the loss in nats per trained token."""
        total = 0.0
        for batch in self.batches():
            with self.autocast():
                loss = self.loss(batch) / self.samples.targets
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    def autocast(self) -> torch.autocast:
        """Autocast as Accelerate uses it for a model in 16 bit."""
        weight = self.built.weight
        half = weight.dtype is torch.bfloat16
        return torch.autocast(weight.device.type, weight.dtype, enabled=half)

    def padded(self, batch: list[EncodedSample]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) ids, mask and labels. Padding is on the right, so positions are the samples'."""
        device = self.built.weight.device
        ids = pad_sequence([sample.input_ids for sample in batch], batch_first=True)
        mask = pad_sequence([torch.ones_like(s.input_ids) for s in batch], batch_first=True)
        labels = pad_sequence([s.labels for s in batch], batch_first=True, padding_value=IGNORE)
        return ids.to(device), mask.to(device), labels.to(device)

    def loss(self, batch: list[EncodedSample]) -> Tensor:
        """Sum of the losses of a batch, in nats."""
        ids, mask, labels = self.padded(batch)
        images = [image for sample in batch for image in sample.images]
        hidden: Tensor = self.built.model.model(
            **self.inputs(ids, images), attention_mask=mask, use_cache=False
        ).last_hidden_state
        # As transformers shifts: the labels move, so that hidden states need not be copied.
        following = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        if not self.all_logits:
            hidden, following = hidden[following != IGNORE], following[following != IGNORE]
        logits = self.built.model.lm_head(hidden).flatten(0, -2).float()
        return F.cross_entropy(logits, following.flatten(), ignore_index=IGNORE, reduction="sum")

    def inputs(self, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Tensor]:
        """The model's inputs: ids and pixels, or embeddings that hold the stored image features."""
        if not self.keeps_features or not images:
            return {"input_ids": ids, **self.samples.processor.image_inputs(images)}
        embeddings: Tensor = self.built.model.get_input_embeddings()(ids)
        found = torch.cat([self.features[image.key] for image in images])
        places = (ids == self.built.native["image_token_id"]).unsqueeze(-1)
        return {"inputs_embeds": embeddings.masked_scatter(places, found.to(embeddings.dtype))}


def clear_gradient(side: Side) -> Tensor:
    """All LoRA gradients of a side as one vector on the CPU, after which they are cleared."""
    found = [p.grad.flatten() for p in side.built.tuned.parameters() if p.grad is not None]
    vector = torch.cat(found).cpu()
    side.built.tuned.zero_grad()
    return vector
