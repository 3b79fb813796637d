"""Configuration, tokenizer and chat template of a model folder, in either layout."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from vlft import console
from vlft.errors import CheckpointError, shown
from vlft.families.base import PREPROCESSOR_FILE, PROCESSOR_FILE
from vlft.families.processor import load_processor, template_source
from vlft.files import json_text, read_object, read_object_if_there, read_text, real_path
from vlft.schema import ANY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from vlft.checkpoints.locate import ModelFolder

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_CHAT_TEMPLATE = "chat_template.jinja"
# Files that may name code, and whose repositories it may be in.
_NAMING_CODE = ("config.json", _TOKENIZER_CONFIG, PREPROCESSOR_FILE, PROCESSOR_FILE)
_PUBLISHER = "deepseek-ai/"
TOKENIZER_FILES = (
    _TOKENIZER, _TOKENIZER_CONFIG, "special_tokens_map.json", _CHAT_TEMPLATE, "chat_template.json",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "generation_config.json")


def write_small_files(
    model: PreTrainedModel, base: ModelFolder, folder: Path, layout: str, dtype: str
) -> None:
    """Writes all but the weights. In the authors' layout, files of a base of it are copied.

    So is the tokenizer of DeepSeek-OCR, whose prompts are plain text.

    Raises:
        CheckpointError: the layout has no field for a setting of the model.
    """
    if layout == base.layout:
        _copy(base, folder, PROCESSOR_FILES)
        config = {key: value for key, value in base.config.items() if key != "dtype"}
        write_json(folder / "config.json", {**config, "torch_dtype": dtype})
    else:
        _write_settings(model, base, folder, layout, dtype)
    if layout == base.layout == "original" or base.family.template is None:
        _copy(base, folder, TOKENIZER_FILES)
    else:
        _write_tokenizer(base, folder, layout)
    if layout == "transformers" and base.family.template is None:
        several = "{%- set several_images = true -%}\n" if base.family.several_images else ""
        text = several + template_source("transformers_plain.jinja")
        (folder / _CHAT_TEMPLATE).write_text(text, "utf-8")
    written = read_object(folder / "config.json", ANY)
    # Where the files that are written do not imply Janus' roles, a chat template states them.
    if base.family.roles(folder, written).names != base.processor().chat.roles:
        _write_chat_template(base, folder)
    if layout != base.layout:
        _check_settings(model, base, folder, written)
    _tell_of_code(base, folder)


def _tell_of_code(base: ModelFolder, folder: Path) -> None:
    """Names what other programs would run of the written files; foreign code is taken out.

    An auto_map names classes in files beside it, which are not copied, or in a repository on the
    hub, as OWNER/REPO--FILE.CLASS.
    """
    kept, dropped = list[str](), list[str]()
    for path in sorted(folder / name for name in _NAMING_CODE if (folder / name).is_file()):
        fields = read_object(path, ANY)
        names = list(_named_code(fields))
        foreign = [name for name in names if "--" in name and not name.startswith(_PUBLISHER)]
        dropped += [f"{path.name}: {name}" for name in foreign]
        if foreign:
            write_json(path, _without_code(fields))
        elif names:
            kept.append(f"auto_map of {path.name}")
    same = folder / _CHAT_TEMPLATE, base.path / _CHAT_TEMPLATE
    if all(path.is_file() for path in same) and read_text(same[0]) == read_text(same[1]):
        kept.append(_CHAT_TEMPLATE)
    if kept:
        console.info(f"copied as they are, for other programs to run: {', '.join(kept)}")
    if dropped:
        console.warn(f"auto_map is left out, it names code of others: {', '.join(dropped)}")


def _named_code(value: Any, *, inside: bool = False) -> Iterator[str]:
    """The texts of each auto_map, at any depth."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _named_code(item, inside=inside or key == "auto_map")
    elif inside and isinstance(value, str):
        yield value


def _without_code(value: Any) -> Any:
    """The value without any auto_map."""
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_code(item) for key, item in value.items() if key != "auto_map"}
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file with lines, as the hub's files have."""
    path.write_text(json_text(value, indent=2) + "\n", "utf-8")


def _copy(base: ModelFolder, folder: Path, names: Sequence[str]) -> None:
    """Copies small files of the base; a link to elsewhere is not followed.

    The hub's cache links the files of a model to its folder of contents.
    """
    home = real_path(base.path)
    contents = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for name in names:
        path = base.path / name
        if path.is_symlink() and real_path(path).parent not in (home, contents):
            found = f"a link to {shown(real_path(path))}, outside of the folder"
            hint = "put the file itself there"
            raise CheckpointError(found, place=shown(path), hint=hint)
        if path.is_file():
            shutil.copyfile(path, folder / name)


def _write_settings(
    model: PreTrainedModel, base: ModelFolder, folder: Path, layout: str, dtype: str
) -> None:
    """Writes the settings of model and processor in the layout that the base does not have."""
    original_config = base.family.original_config
    if original_config is None:
        raise ValueError(f"{base.family.title} has one layout")
    files = base.processor().pixels.files
    if layout == "original":
        images = files["transformers"][PREPROCESSOR_FILE]
        config = original_config(_native_config(model, base), dtype, images)
        write_json(folder / "config.json", config)
    else:
        stated = {"dtype": dtype, "architectures": [type(model).__name__]}
        write_json(folder / "config.json", {**model.config.to_dict(), **stated})
        chat = base.processor().chat
        generation = {"bos_token_id": chat.bos_id, "eos_token_id": chat.eos_id}
        write_json(folder / "generation_config.json", {**generation, "pad_token_id": chat.pad_id})
    for name, content in files[layout].items():
        write_json(folder / name, content)


def _write_tokenizer(base: ModelFolder, folder: Path, layout: str) -> None:
    """Writes the tokenizer so that the classes of the layout give vlft's ids.

    transformers reads special tokens by name, and takes BOS from the post-processor of
    tokenizer.json. The authors' processor adds BOS itself.
    """
    _copy(base, folder, ["special_tokens_map.json"])
    processor, chat = base.processor(), base.processor().chat
    tokenizer = json.loads(chat.tokenizer.to_str())
    config = read_object_if_there(base.path / _TOKENIZER_CONFIG, ANY)
    for name in ("extra_special_tokens", "added_tokens_decoder", "chat_template", "auto_map"):
        config.pop(name, None)
    config["processor_class"] = processor.pixels.files[layout][PREPROCESSOR_FILE]["processor_class"]
    token = chat.tokenizer.id_to_token
    names = {"bos_token": chat.bos_id, "eos_token": chat.eos_id, "pad_token": chat.pad_id}
    config |= {name: token(token_id) for name, token_id in names.items()}
    if layout == "original":
        tokenizer["post_processor"] = _without_bos(tokenizer["post_processor"])
        config |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    else:
        if chat.tokenizer.encode("a").ids[0] != chat.bos_id:
            inner, bos = tokenizer["post_processor"], str(config["bos_token"])
            tokenizer["post_processor"] = _with_bos(inner, bos, chat.bos_id)
        extra = {"image_token": chat.image_tag}
        if base.family.image_border:
            extra |= dict(zip(("boi_token", "eoi_token"), base.family.image_border, strict=True))
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": extra}
        config["padding_side"] = "left"
        _write_chat_template(base, folder)
    write_json(folder / _TOKENIZER, tokenizer)
    write_json(folder / _TOKENIZER_CONFIG, config)


def _with_bos(inner: dict[str, Any] | None, bos: str, bos_id: int) -> dict[str, Any]:
    """A post-processor that puts BOS before each text, after what ``inner`` does."""
    pieces = {
        name: [
            {"SpecialToken": {"id": bos, "type_id": number}},
            {"Sequence": {"id": name, "type_id": number}},
        ]
        for number, name in enumerate("AB")
    }
    template = {
        "type": "TemplateProcessing",
        "single": pieces["A"],
        "pair": pieces["A"] + pieces["B"],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
    return {"type": "Sequence", "processors": [*([inner] if inner else []), template]}


def _without_bos(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The inner post-processor of one that ``_with_bos`` has made; any other is left as it is."""
    if not processor or processor["type"] != "Sequence":
        return processor
    *inner, last = processor["processors"]
    if last["type"] != "TemplateProcessing" or len(inner) > 1:
        return processor
    return inner[0] if inner else None


def _write_chat_template(base: ModelFolder, folder: Path) -> None:
    """The chat template for transformers, with the roles and system prompt of this checkpoint."""
    chat = base.processor().chat
    user, assistant = chat.roles
    text = template_source("transformers_chat.jinja")
    text = text.replace('"USER"', json.dumps(user)).replace('"ASSISTANT"', json.dumps(assistant))
    text = text.replace("ASSISTANT:", f"{assistant}:").replace("SYSTEM", chat.system_prompt)
    (folder / _CHAT_TEMPLATE).write_text(text, "utf-8")


def _native_config(model: PreTrainedModel, base: ModelFolder) -> dict[str, Any]:
    """The base's configuration, tied as the loaded model is."""
    config, tied = base.native_config(), {"tie_word_embeddings": model.config.tie_word_embeddings}
    return {**config, **tied, "text_config": {**config["text_config"], **tied}}


def _check_settings(
    model: PreTrainedModel, base: ModelFolder, folder: Path, written: dict[str, Any]
) -> None:
    """Raises CheckpointError if the written files give another model or other pixels."""
    family, before = base.family, base.processor()
    after = load_processor(folder, family, written)
    make = type(model.config)
    configs = [
        make(**_native_config(model, base)).to_dict(),
        make(**family.native_config(written, before.chat.image_token_id)).to_dict(),
    ]
    lost = [*_differences(*configs)]
    lost += _differences(dict(before.pixels.files), dict(after.pixels.files))
    if not lost and after.pixels.fingerprint != before.pixels.fingerprint:
        lost = ["the treatment of images"]
    if lost:
        raise CheckpointError(
            f"the other layout has no field for {'; '.join(dict.fromkeys(lost))}",
            place=shown(base.path),
            hint=f"keep the {base.layout} layout with --format {base.layout}",
        )


def _differences(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Each field with another value, as ``vision_config.hidden_act 'relu' (not 'gelu')``."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _differences(before.get(key), after.get(key), f"{name}.{key}".strip("."))
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        if [*before] != [*after]:
            yield f"{name} {[*before]} (it would be {[*after]})"
    elif before != after:
        yield f"{name} {before!r} (it would be {after!r})"
