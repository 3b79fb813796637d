"""The models that clients can ask for: a base and its adapters, or a whole model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import locate_model
from vlft.checkpoints.placement import resolve_placement
from vlft.checkpoints.switch import Adapters
from vlft.checkpoints.tuned import open_tuned
from vlft.errors import ConfigError, shown
from vlft.files import expand_home
from vlft.inference.features import Features
from vlft.inference.generate import Sampling
from vlft.inference.model import treat_images
from vlft.inference.replier import Replier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.checkpoints.locate import ModelFolder
    from vlft.checkpoints.tuned import Tuned
    from vlft.config import ServeConfig
    from vlft.families.processor import Processor
    from vlft.serving.jobs import Job


@dataclass(frozen=True, eq=False)
class Served:
    """A model under a name.

    Attributes:
        id: its name.
        adapter: whether it is the adapter of this name, or the base alone.
        processor: of it.
        sampling: of requests that ask for nothing else, all settings resolved.
    """

    id: str
    adapter: bool
    processor: Processor
    sampling: Sampling


class Models:
    """All of them, one of which is in place at a time.

    Attributes:
        served: by name, the base first.
    """

    def __init__(
        self, base: Any, served: Mapping[str, Served], adapters: Adapters, chunk: int | None
    ) -> None:
        self.served = served
        self._adapters, self._chunk = adapters, chunk
        self._features = {name: Features(base, one.processor) for name, one in served.items()}

    def answer(self, jobs: Sequence[Job]) -> None:
        """Answers jobs of one model and equal settings, together."""
        served = jobs[0].served
        model = self._adapters.use(served.id if served.adapter else None)
        features = self._features[served.id]
        sampling = jobs[0].sampling
        replier = Replier(model, served.processor, sampling, features, self._chunk)
        prompts, seeds = [job.prompt for job in jobs], [job.seed for job in jobs]
        (replies,) = replier.replies(prompts, seeds, [range(len(jobs))], readers=jobs)
        for job, reply in zip(jobs, replies, strict=True):
            job.finish(reply)


@dataclass(frozen=True)
class Found:
    """Models on disk, checked and not loaded.

    Attributes:
        base: of all.
        tuned: adapters by name; a whole tuned model is the base, under its name.
        name: of the base.
    """

    base: ModelFolder
    tuned: Mapping[str, Tuned]
    name: str


def find_models(config: ServeConfig) -> Found:
    """The models that the settings name.

    Raises:
        UsageError: one cannot be used, or they have not one base.
    """
    hub: Any = {"revision": config.revision, "hub": config.hub}
    if not config.ckpt_dir:
        base = locate_model(config.model, **hub)
        return Found(base, {}, _name_of(base))
    tuned: dict[str, Tuned] = {}
    for given in config.ckpt_dir:
        name, path = _named(given)
        one = open_tuned(path, model=config.model, **hub, accept_changes=config.accept_changes)
        tuned[_free(name or _name_of_checkpoint(one), tuned, given)] = one
    (name, first), *others = tuned.items()
    whole = next((one for one in tuned.values() if one.adapter is None), None)
    if whole is not None and others:
        found = f"{shown(whole.checkpoint)} is a whole model, which is served alone"
        raise ConfigError(found, place="--ckpt-dir", hint="serve it by a command of its own")
    for other, one in others:
        if one.base.weights_digest != first.base.weights_digest:
            found = f"{other} has the base {shown(one.base.path)}, {name} {shown(first.base.path)}"
            raise ConfigError(found, place="--ckpt-dir", hint="serve adapters of one base")
    if whole is not None:
        return Found(first.base, tuned, name)
    return Found(first.base, tuned, _free(_name_of(first.base), tuned, config.model or "the base"))


def load_models(config: ServeConfig, found: Found) -> Models:
    """Loads the base once, and the adapters.

    Raises:
        UsageError: one cannot be loaded.
    """
    with console.working("loading the model"):
        base = load_model(found.base, placement(config, list(found.tuned.values())))
    adapters = Adapters(base)
    whole = next((one for one in found.tuned.values() if one.adapter is None), None)
    served = {found.name: _served(config, found.name, whole, found.base)}
    for name, one in found.tuned.items():
        if one.adapter is not None:
            adapters.add(name, one.adapter)
            served[name] = _served(config, name, one, found.base)
    return Models(base, served, adapters, config.prefill_chunk)


def _served(config: ServeConfig, name: str, tuned: Tuned | None, base: ModelFolder) -> Served:
    _, processor = treat_images(config, tuned, base)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram=config.no_repeat_ngram,
        ngram_window=config.ngram_window,
    )
    is_adapter = tuned is not None and tuned.adapter is not None
    return Served(name, is_adapter, processor, sampling.resolved(processor.family))


def placement(config: ServeConfig, tuned: Sequence[Tuned]) -> Any:
    """Device, dtype and quantisation; where the user is silent, the last two are the training's.

    Raises:
        ConfigError: adapters were trained in different ways.
    """
    chosen = {"dtype": config.dtype, "quantize": config.quantize or ""}
    for name, silent in (("dtype", "auto"), ("quantize", "")):
        of_runs = sorted({getattr(one.settings, name) for one in tuned})
        if chosen[name] == silent and len(of_runs) > 1:
            found = f"the adapters were trained with {' and '.join(of_runs)}"
            raise ConfigError(found, place=f"--{name}", hint="say which to serve them with")
        if chosen[name] == silent and of_runs:
            chosen[name] = of_runs[0]
    return resolve_placement(
        dtype=chosen["dtype"],
        device=config.device,
        quantize=chosen["quantize"] or "none",
        attn=config.attn,
    )


def _named(given: str) -> tuple[str, Path]:
    """The name and the path of NAME=PATH, or of a path alone."""
    name, sign, path = given.partition("=")
    if not sign or os.path.lexists(given):
        return "", Path(given)
    return name, Path(expand_home(path))


def _free(name: str, taken: Mapping[str, Any], given: str) -> str:
    """The name, which no other model has.

    Raises:
        ConfigError: one has.
    """
    if not name.isprintable() or not name.strip():
        found = f"found the name {name!r} of {given}, printable characters are needed"
        raise ConfigError(found, place="--ckpt-dir", hint="write NAME=PATH")
    if name in taken:
        hint = "write NAME=PATH for one of them"
        raise ConfigError(f"two models have the name {name}", place="--ckpt-dir", hint=hint)
    return name


def _name_of(folder: ModelFolder) -> str:
    """A hub id as it is; of a path its last part."""
    return Path(folder.name).name if Path(folder.name).is_dir() else folder.name


def _name_of_checkpoint(tuned: Tuned) -> str:
    """Run and checkpoint, or the folder's name."""
    folder = tuned.checkpoint
    return f"{folder.parent.name}/{folder.name}" if tuned.run else folder.name
