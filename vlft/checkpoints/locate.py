"""Name of a model -> its folder, family and layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.checkpoints.identity import weights_digest
from vlft.config import SftConfig
from vlft.errors import CheckpointError, ConfigError, shown
from vlft.families.processor import Processor, config_errors, load_processor
from vlft.families.registry import find_family
from vlft.families.schemas import CONFIG as CONFIG_SCHEMA
from vlft.files import expand_home, read_object, sample_folder

if TYPE_CHECKING:
    from vlft.families.base import Family


TINY_MODEL = sample_folder("tiny-vl")

# No .py: nothing executable is downloaded.
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "LICENSE*")
_WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk."""

    path: Path
    name: str  # as the user gave it
    config: dict[str, Any]  # config.json
    family: Family
    layout: str  # original (the authors') or transformers
    roles: tuple[str, str] | None = None  # of user and assistant, if not those that the files state

    @property
    def dtype(self) -> str:
        """The data type of the weights that config.json states, e.g. bfloat16."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        return str(stated).removeprefix("torch.")

    def processor(self) -> Processor:
        """Tokenizer, chat format and image treatment of this checkpoint; loaded once."""
        return self._processor

    @cached_property
    def _processor(self) -> Processor:
        return load_processor(self.path, self.family, self.config, self.roles)

    @cached_property
    def weights_digest(self) -> str:
        """See identity.weights_digest; computed once."""
        return weights_digest(self)

    def native_config(self, image_token_id: int | None = None) -> dict[str, Any]:
        """Keyword arguments of transformers' config; a given image token spares the tokenizer."""
        if image_token_id is None:
            image_token_id = self.processor().chat.image_token_id
        with config_errors(self.path, self.family):
            return self.family.native_config(self.config, image_token_id)


def locate_model(
    name: str | None, *, revision: str | None = None, hub: str = SftConfig.hub, weights: bool = True
) -> ModelFolder:
    """The folder of a model, downloaded if it is named by a hub id; with or without weights.

    None names the tiny model that comes with vlft.

    Raises:
        CheckpointError: there is no such model, or vlft does not support it.
    """
    if name is None:
        if not (TINY_MODEL / "config.json").exists():
            raise ConfigError(
                f"no model is named, and the tiny model is not at {TINY_MODEL}",
                place="--model",
                hint="name a folder or a hub id, e.g. --model deepseek-ai/deepseek-vl-1.3b-chat",
            )
        name = str(TINY_MODEL)
    path = Path(expand_home(name))
    if not path.is_dir():
        patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())]
        path = _download(name, revision, hub, patterns)
    folder = describe(path, name)
    roles, source = folder.family.roles(path, folder.config)
    if roles and source:
        console.info(f"roles: {', '.join(roles)} ({source})")
    return folder


def describe(path: Path, name: str = "") -> ModelFolder:
    """The model in a folder.

    Raises:
        CheckpointError: there is no config.json, or it is not of a supported family.
    """
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"no config.json; found {found}",
            place=str(path),
            hint="name the folder that holds config.json and the weights",
        )
    config = read_object(path / "config.json", CONFIG_SCHEMA)
    family, layout = find_family(config, place=shown(path / "config.json"))
    return ModelFolder(path, name or str(path), config, family, layout)


def _download(name: str, revision: str | None, hub: str, patterns: list[str]) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise CheckpointError(
            "no such folder, and not a hub id either",
            place=f"--model {name}",
            hint="name a folder, or an id of the form owner/model",
        )
    fetch = _from_modelscope if hub == "modelscope" else _from_hub
    return fetch(name, revision, patterns)


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"no such folder, and the hub did not give it: {reason}",
            place=f"--model {name}",
            hint="check the name, --revision and the network, or name a folder",
        ) from None


def _from_modelscope(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ConfigError(
            "the modelscope library is not installed",
            place="--hub modelscope",
            hint="pip install 'vlft[modelscope]'",
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_file_pattern=patterns))
    except (OSError, ValueError) as error:
        reason = f"modelscope did not give it: {error}"
        raise CheckpointError(reason, place=f"--model {name}") from None
