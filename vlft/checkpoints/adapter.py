"""Reads adapter folders in peft's format by an allow-list, vlft's own and those of other tools.

An adapter_config.json may name modules to import and files to load. Only the fields below are
read, all others must have peft's default; weights are safetensors, and only those that the
configuration calls for.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, LoraModel, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlft import console
from vlft.checkpoints.adapter_names import PREFIX, adapt, refuse
from vlft.checkpoints.identity import BASE
from vlft.checkpoints.quantize import holds_quantized, is_quantized
from vlft.checkpoints.runs import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from vlft.config import INIT_LORA
from vlft.distributed import full_tensor
from vlft.errors import CheckpointError, ConfigError, shown
from vlft.families.registry import family_of
from vlft.files import save_tensors
from vlft.models.experts import PLAIN_EXPERTS, Experts4bit, ParamWrapper

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


_READ_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
    "use_dora", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "bias",
    "task_type", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "lora_bias",
    "base_model_name_or_path",
)  # fmt: skip

# Not read, because they do not change what the adapter computes; modules_to_save is read apart.
_IGNORED_FIELDS = (
    "peft_type", "peft_version", "inference_mode", "revision", "runtime_config", "auto_mapping",
    "modules_to_save",
)  # fmt: skip
_OTHER_BASE = "use the base that it was trained on"


def adapter_tensors(peft_model: Any) -> dict[str, Tensor]:
    """The adapter's weights, gathered on the CPU; collective if the model is sharded."""
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {name: full_tensor(tensor) for name, tensor in state.items()}


def save_adapter(
    peft_model: Any, folder: Path, tensors: dict[str, Tensor] | None = None, base: str = ""
) -> None:
    """Writes adapter_config.json and the weights, as gathered before or gathered now.

    ``base`` is the digest of the base's weights, by which another base is noticed.
    """
    tensors = adapter_tensors(peft_model) if tensors is None else tensors
    save_tensors(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt", BASE: base})
    peft_model.peft_config["default"].save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> Any:
    """Peft's model around ``model``, into which the adapter of a folder is put in place.

    Parts that the adapter's configuration says were trained fully are replaced, and named.

    Raises:
        CheckpointError: a file is missing, asks for more than LoRA, or does not fit the model.
    """
    config, saved = _read_config(folder)
    _check_start(model, config, folder)
    config.inference_mode = not trainable
    if not trainable:
        config.lora_dropout = 0.0
    try:
        adapted = adapt(model, family_of(model), config, saved, _read_tensors(folder))
        _replace(model, adapted.full, folder, trainable=trainable)
        register_experts_layer(adapted.config)
        with warnings.catch_warnings():
            # peft warns of settings that matter in training alone, in words that quote the file,
            # and of patterns for stacked weights as if it did not use them.
            warnings.simplefilter("ignore")
            peft_model = PeftModel(model, adapted.config)
            state = _state(peft_model, adapted.lora)
            expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
            refuse(state.keys() - expected, expected - state.keys())
            _load(peft_model, state)
    except CheckpointError as error:
        place, hint = error.place or str(folder / ADAPTER_WEIGHTS), error.hint or _OTHER_BASE
        raise CheckpointError(error.message, place=place, hint=hint) from None
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        message = f"the adapter does not fit the model: {reason}"
        raise CheckpointError(
            message, place=shown(folder / ADAPTER_CONFIG), hint=_OTHER_BASE
        ) from None
    return peft_model.train(trainable)


def _load(peft_model: Any, state: dict[str, Tensor]) -> None:
    """Loads the weights under peft's names into the adapter.

    Not by set_peft_model_state_dict: it applies transformers' renaming of the authors' tensors to
    names that are the model's own already, which loses all weights of DeepSeek-OCR without an error
    (peft 0.21).
    """
    config = peft_model.peft_config["default"]
    named = LoraModel._remap_adapter_state_dict_for_load(
        model=peft_model, config=config, adapter_name="default", state_dict=dict(state)
    )
    unknown = peft_model.load_state_dict(named, strict=False).unexpected_keys
    refuse(unknown, ())


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        hint = "only safetensors adapters are read"
        raise CheckpointError(f"no {ADAPTER_WEIGHTS}", place=str(folder), hint=hint)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        message = f"the adapter does not fit the model: {error}"
        hint = "write or download the adapter again"
        raise CheckpointError(message, place=str(path), hint=hint) from None
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        found = f"holds values that are no numbers (NaN or infinite): {', '.join(broken[:3])}"
        hint = "train it again, with a lower learning rate, or take an earlier checkpoint"
        raise CheckpointError(found, place=shown(path), hint=hint)
    return tensors


def _replace(
    model: nn.Module, tensors: dict[str, Tensor], folder: Path, *, trainable: bool
) -> None:
    """Replaces the base's weights in the parts that the adapter trained fully."""
    if not tensors:
        return
    owners = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    hint = f"merge it first: vlft merge-lora --ckpt-dir {folder}"
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter: Any = getattr(owner, leaf)
        if trainable or holds_quantized(owner, leaf):
            what = "training" if trainable else "quantisation"
            message = f"the adapter replaces {owners}, which does not go with {what}"
            raise CheckpointError(message, place=str(folder), hint=hint)
        if parameter.shape != tensor.shape:
            message = f"{name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}"
            raise CheckpointError(f"the adapter does not fit the model: {message}")
        parameter.data = tensor.to(parameter.device, parameter.dtype)
    console.info(f"{shown(folder)} replaces parts that were trained fully: {owners}")


def _state(peft_model: Any, lora: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gives the LoRA tensors the names that peft's state dict has for them."""
    # If several weights of a module have LoRA, peft nests their layers in an order of its own.
    stacked = {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": name
        for name, module in peft_model.named_modules()
        if isinstance(module, ParamWrapper)
    }
    places = {name: stacked.get(PREFIX + name, PREFIX + name) for name in lora}
    return {f"{places[n]}.{key}": t for n, tensors in lora.items() for key, t in tensors.items()}


def _check_start(model: Any, config: Any, folder: Path) -> None:
    """Raises ConfigError if the adapter's start changes base weights that are quantised."""
    start = config.init_lora_weights
    if start == "orthogonal":
        # It leaves the base as it is, and its matrices are about to be replaced; peft would make
        # them in the dtype of the weights, which fails for quantised ones.
        config.init_lora_weights = True
    if start in ("olora", "pissa") and any(map(is_quantized, model.modules())):
        raise ConfigError(
            f"the adapter started with {start}, which changes base weights in full precision",
            place="--quantize",
            hint=f"merge it first: vlft merge-lora --ckpt-dir {folder}, then quantise the result",
        )


def register_experts_layer(config: Any) -> None:
    """Registers vlft's LoRA layer for experts with peft, in place of peft's own."""
    if config.target_parameters:
        config._register_custom_module(dict.fromkeys((*PLAIN_EXPERTS, Experts4bit), ParamWrapper))


def _read_config(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """Reads the LoraConfig and modules_to_save; fields that vlft does not read are refused."""
    path = folder / ADAPTER_CONFIG
    fields = read_adapter_config(folder)
    if (kind := fields.get("peft_type")) != "LORA":
        raise CheckpointError(f"found peft_type {kind!r}, 'LORA' is allowed", place=str(path))
    defaults = LoraConfig().to_dict()
    refused = [
        name
        for name, value in fields.items()
        if name not in _READ_FIELDS + _IGNORED_FIELDS and value != defaults.get(name) and value
    ]
    if refused:
        raise CheckpointError(
            f"uses {', '.join(refused)}, which vlft does not read",
            place=str(path),
            hint="only plain LoRA, DoRA and rsLoRA adapters are loaded",
        )
    init = fields.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in INIT_LORA:
        hint = f"allowed: true, false, {', '.join(INIT_LORA[1:])}"
        raise CheckpointError(f"found init_lora_weights {init!r}", place=str(path), hint=hint)
    try:
        config = LoraConfig(**{name: fields[name] for name in _READ_FIELDS if name in fields})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot be used: {error}", place=str(path)) from None
    return config, tuple(fields.get("modules_to_save") or ())
