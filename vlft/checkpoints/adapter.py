"""Adapter folders in peft's format, read by an allow-list.

An adapter_config.json may name modules to import and files to load. Only the fields below are
read, all others must have peft's default; weights are safetensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from vlft.checkpoints.quantize import is_quantized
from vlft.config import INIT_LORA
from vlft.distributed import full_tensor
from vlft.errors import CheckpointError, ConfigError
from vlft.files import read_object, save_tensors
from vlft.models.experts import PLAIN_EXPERTS, Experts4bit, ParamWrapper

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"

_READ_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
    "use_dora", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "bias",
    "task_type", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "lora_bias",
    "base_model_name_or_path",
)  # fmt: skip

# They do not change what the adapter computes, and are not read.
_IGNORED_FIELDS = ("peft_type", "peft_version", "inference_mode", "revision", "runtime_config")


def adapter_tensors(peft_model: Any) -> dict[str, Tensor]:
    """The adapter's weights, gathered on the CPU; collective if the model is sharded."""
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {name: full_tensor(tensor) for name, tensor in state.items()}


def save_adapter(peft_model: Any, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Writes adapter_config.json and the weights, as gathered before or gathered now."""
    tensors = adapter_tensors(peft_model) if tensors is None else tensors
    save_tensors(tensors, folder / _WEIGHTS_FILE)
    peft_model.peft_config["default"].save_pretrained(str(folder))


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / _CONFIG_FILE).is_file()


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> Any:
    """Peft's model around ``model``, into which the adapter of a folder is put in place.

    Raises:
        CheckpointError: a file is missing, asks for more than LoRA, or does not fit the model.
    """
    config = _read_config(folder)
    _check_start(model, config, folder)
    config.inference_mode = not trainable
    register_experts_layer(config)
    weights = folder / _WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(
            f"no {_WEIGHTS_FILE}", place=str(folder), hint="only safetensors adapters are read"
        )
    try:
        peft_model = PeftModel(model, config)
        result = set_peft_model_state_dict(peft_model, load_file(weights))
    except (RuntimeError, SafetensorError, ValueError) as error:
        raise _mismatch(folder, str(error).strip().splitlines()[-1].strip()) from None
    missing = [name for name in result.missing_keys if "lora_" in name]
    if result.unexpected_keys or missing:
        raise _mismatch(folder, ", ".join([*result.unexpected_keys, *missing][:3]))
    return peft_model.train(trainable)


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


def _mismatch(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter does not fit the model: {reason}",
        place=str(folder),
        hint="use the base that it was trained on",
    )


def register_experts_layer(config: Any) -> None:
    """Registers vlft's LoRA layer for experts with peft, in place of peft's own."""
    if config.target_parameters:
        config._register_custom_module({PLAIN_EXPERTS: ParamWrapper, Experts4bit: ParamWrapper})


def _read_config(folder: Path) -> Any:
    """The LoraConfig of a folder, if it uses no field that vlft does not read."""
    path = folder / _CONFIG_FILE
    fields = read_object(path)
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
        return LoraConfig(**{name: fields[name] for name in _READ_FIELDS if name in fields})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot be used: {error}", place=str(path)) from None
