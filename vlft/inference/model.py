"""The model that a command runs: the one of a checkpoint, with its adapter, or one by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vlft import console
from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import ModelFolder, locate_model
from vlft.checkpoints.merge import load_full_precision, put_into
from vlft.checkpoints.placement import Placement, resolve_placement
from vlft.checkpoints.switch import Adapters, keeps_base
from vlft.checkpoints.tuned import Tuned, open_tuned
from vlft.families.image_settings import ImageSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlft.config import DrawConfig, InferConfig, ServeConfig
    from vlft.families.processor import Processor


def find_model(config: InferConfig | DrawConfig) -> tuple[Tuned | None, ModelFolder]:
    """The first checkpoint, if one is named, and its base or the model itself."""
    hub: Any = {"revision": config.revision, "hub": config.hub}
    given = config.ckpt_dir
    if not given:
        return None, locate_model(config.model, **hub)
    accept = config.accept_changes
    first = given[0] if isinstance(given, tuple) else given
    tuned = open_tuned(first, model=config.model, **hub, accept_changes=accept)
    return tuned, tuned.base


def placement_of(config: InferConfig | DrawConfig, tuned: Tuned | None) -> Placement:
    """Device, dtype and quantisation; where the user is silent, the last two are the training's."""
    dtype, quantize = config.dtype, config.quantize
    if tuned is not None:
        dtype = tuned.settings.dtype if dtype == "auto" else dtype
        quantize = quantize or tuned.settings.quantize
    device, quantize = config.device, quantize or "none"
    return resolve_placement(dtype=dtype, device=device, quantize=quantize, attn=config.attn)


def treat_images(
    config: InferConfig | ServeConfig, tuned: Tuned | None, folder: ModelFolder
) -> tuple[ImageSettings, Processor]:
    """How images are treated, and the processor that does it."""
    if tuned is None:
        settings, source = ImageSettings.of(config), None
    else:
        settings = ImageSettings.of(config, tuned.settings)
        source = None if ImageSettings.of(config).changed else tuned.settings_file
    tokens = config.special_tokens or (tuned.settings.special_tokens if tuned else "text")
    return settings, settings.apply(folder.processor(), source).with_special_tokens(tokens)


def load_for_chat(
    config: InferConfig, folder: ModelFolder, tuned: Tuned | None, placement: Placement
) -> tuple[Any, Callable[[bool], Any] | None]:
    """The model, and a function that returns it with its adapter or without; None if it cannot."""
    adapter = tuned.adapter if tuned else None
    if adapter is None or config.merge_lora or not keeps_base(adapter):
        return load_for_inference(config, folder, tuned, placement), None
    with console.working("loading the model"):
        adapters = Adapters(load_model(folder, placement))
        adapters.add("tuned", adapter)
    return adapters.use("tuned"), lambda on: adapters.use("tuned" if on else None)


@console.working("loading the model")
def load_for_inference(
    config: InferConfig | DrawConfig, folder: ModelFolder, tuned: Tuned | None, placement: Placement
) -> Any:
    """The model; with its adapter, or merged."""
    if tuned is None or tuned.adapter is None:
        return load_model(folder, placement)
    if not config.merge_lora:
        return load_adapter(load_model(folder, placement), tuned.adapter)
    # On the CPU, as the whole model in float32 takes twice the memory that answering needs.
    whole = replace(placement, device=torch.device("cpu"), dtype=torch.float32, quantize="none")
    model = load_full_precision(tuned, whole, "dequantized")
    merged = put_into(load_adapter(model, tuned.adapter), tuned.adapter)
    return merged.to(placement.dtype).to(placement.device)
