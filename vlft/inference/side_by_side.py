"""Several checkpoints of one base that answer the same records, side by side in one file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.checkpoints.load import load_model
from vlft.checkpoints.switch import Adapters
from vlft.checkpoints.tuned import open_tuned
from vlft.errors import ConfigError, shown
from vlft.families.image_settings import ImageSettings
from vlft.inference.features import find_features
from vlft.inference.model import load_for_inference, placement_of
from vlft.inference.replier import Replier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vlft.checkpoints.locate import ModelFolder
    from vlft.checkpoints.placement import Placement
    from vlft.checkpoints.tuned import Tuned
    from vlft.config import InferConfig
    from vlft.data.encode import EncodedImage
    from vlft.families.processor import Processor
    from vlft.inference.generate import Sampling

ONE_BY_ONE = "answer with them one by one, or give the setting for all"


def find_sides(config: InferConfig, first: Tuned | None) -> dict[str, Tuned]:
    """The checkpoints by the names that result lines have for them; none if fewer than two.

    Args:
        config: of the command.
        first: the first of them, opened.

    Raises:
        UsageError: one cannot be used, or is of another base or treated otherwise than the first.
    """
    if first is None or len(config.ckpt_dir) < 2:
        return {}
    hub: Any = {"revision": config.revision, "hub": config.hub}
    accept = config.accept_changes
    others = [
        open_tuned(path, model=config.model, **hub, accept_changes=accept)
        for path in config.ckpt_dir[1:]
    ]
    for one in (first, *others):
        _check_side(config, one, first)
    names: dict[str, Tuned] = {}
    for one in (first, *others):
        short = f"{one.checkpoint.parent.name}/{one.checkpoint.name}"
        name = str(one.checkpoint) if short in names else short
        if name in names or any(one.checkpoint == other.checkpoint for other in names.values()):
            found = f"{shown(one.checkpoint)} twice"
            raise ConfigError(found, place="--ckpt-dir", hint="name each checkpoint once")
        names[name] = one
    return names


def _check_side(config: InferConfig, one: Tuned, first: Tuned) -> None:
    """Raises ConfigError if a checkpoint cannot stand beside the first."""
    place, name = "--ckpt-dir", shown(one.checkpoint)
    if one.adapter is None:
        found = f"{name} is a whole model; several checkpoints are adapters of one base"
        raise ConfigError(found, place=place, hint="answer with it by a command of its own")
    if one.base.weights_digest != first.base.weights_digest:
        found = f"{name} has the base {shown(one.base.path)}, not {shown(first.base.path)}"
        raise ConfigError(found, place=place, hint="name adapters of one base")
    if config.load_dataset_config and (one.run is None or one.run != first.run):
        found = f"{name} is of another run than the first, with a validation set of its own"
        raise ConfigError(found, place="--load-dataset-config", hint="name a file with --dataset")
    for what, of in (
        ("image settings", lambda tuned: ImageSettings.of(config, tuned.settings)),
        ("dtype or quantisation", lambda tuned: placement_of(config, tuned)),
        ("--special-tokens", lambda t: config.special_tokens or t.settings.special_tokens),
    ):
        if of(one) != of(first):
            raise ConfigError(f"{name} has other {what}", place=place, hint=ONE_BY_ONE)


def load_repliers(
    config: InferConfig,
    folder: ModelFolder,
    tuned: Tuned | None,
    sides: Mapping[str, Tuned],
    placement: Placement,
    processor: Processor,
    sampling: Sampling,
    images: Sequence[EncodedImage],
) -> list[Callable[[], Replier]]:
    """A function for each side that puts its adapter in place and returns what replies with it.

    Args:
        config: of the command.
        folder: of the base.
        tuned: the checkpoint, if there is a single one.
        sides: the checkpoints, if there are several. The base is loaded once.
        placement: of the model.
        processor: of the model.
        sampling: of the replies.
        images: all distinct images that will be asked for.
    """
    if not sides:
        model = load_for_inference(config, folder, tuned, placement)
        whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        features = find_features(config.vision_cache, whole, processor, images)
        replier = Replier(model, processor, sampling, features, config.prefill_chunk)
        return [lambda: replier]
    with console.working("loading the model"):
        base = load_model(folder, placement)
    adapters = Adapters(base)
    for name, one in sides.items():
        if one.adapter is not None:
            adapters.add(name, one.adapter)

    def replier_of(name: str) -> Replier:
        model = adapters.use(name)
        return Replier(model, processor, sampling, features_of[name], config.prefill_chunk)

    features_of = {}
    for name in sides:
        # An adapter may change the aligner and the towers.
        adapters.use(name)
        features_of[name] = find_features(config.vision_cache, base, processor, images)
    return [partial(replier_of, name) for name in sides]
