"""The model card: what was made, from what, how, and how good it was.

It names no folder of this machine and holds no text of the data: files stand in it by their names
and digests, and the command is written anew from the settings.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft import __version__
from vlft.config import SftConfig
from vlft.errors import printable
from vlft.evaluation.own import ENDING, name_of
from vlft.settings import flag
from vlft.sharing.source import as_json, layout_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vlft.sharing.source import Source

NAME = "README.md"
# By this line a card of ours is known.
MARK = "<!-- model card of vlft -->"
# Settings that say where files are, or what belongs to the machine.
LEFT_OUT = ("output_dir", "image_root", "confine_images", "report_to", "device", "adapter")
PATHS = ("model", "dataset", "val_dataset", "eval_metric")


def card(source: Source, repo: str | None, licence: Mapping[str, str]) -> str:
    """The card as Markdown with a header in YAML.

    Args:
        source: what is shared.
        repo: its repository, if it is known.
        licence: of the base, as fields of the header.
    """
    header = [f"{key}: {as_json(value)}" for key, value in _header(source, licence)]
    parts = [
        "\n".join(["---", *header, "---"]),
        MARK,
        f"# {(repo or source.folder.name).rpartition('/')[2]}",
        _introduction(source),
        _use(source, repo),
        *_training(source),
        *_results(source),
        _licence(source, licence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(source: Source, licence: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    if source.hub_base:
        yield "base_model", source.hub_base
        yield "base_model_relation", "adapter" if source.is_adapter else "finetune"
    if source.is_adapter:
        yield "library_name", "peft"
    else:
        native = layout_of(source.folder) == "transformers"
        yield "library_name", "transformers" if native else "vlft"
    yield "pipeline_tag", "image-text-to-text"
    tuner = "lora" if source.is_adapter or _is_lora(source) else "full"
    yield "tags", ["vlft", tuner, "deepseek"] if source.settings else ["vlft", "deepseek"]
    yield from licence.items()


def _is_lora(source: Source) -> bool:
    return source.settings is not None and source.settings.tuner == "lora"


def _introduction(source: Source) -> str:
    what = "A LoRA adapter for" if source.is_adapter else "A model tuned from"
    by = f"made with vlft {source.origin.get('vlft', __version__)}"
    if source.base is None:
        return f"{'A LoRA adapter' if source.is_adapter else 'A model'}, {by}."
    base = source.hub_base
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{_plain(source.base_name)}`"
    weights = source.origin.get("base_weights", "")
    digest = (
        f", whose weights have the digest `{weights.rpartition(':')[2][:16]}`"
        if weights and not base
        else ""
    )
    return f"{what} {name}{digest}, {by}."


def _use(source: Source, repo: str | None) -> str:
    place = repo or "OWNER/NAME"
    asked = "--image page.png --query 'What does it say?'"
    if source.is_adapter:
        base = shlex.quote(_plain(source.base_name)) if source.base else "BASE"
        command = f"vlft infer --ckpt-dir adapter --model {base} {asked}"
        lines = [f"hf download {place} --local-dir adapter", command]
    else:
        lines = [f"vlft infer --model {place} {asked}"]
    return "## Use\n\n" + _block("sh", ["pip install vlft", *lines])


def _training(source: Source) -> Iterator[str]:
    if source.settings is None:
        return
    digests = source.origin.get("data", {})
    made = ["vlft sft", *_flags(source.settings)]
    yield "## Training\n\n" + _block("sh", [" \\\n    ".join(made)])
    if digests:
        lines = [f"{digest}  {_plain(Path(path).name)}" for path, digest in digests.items()]
        yield "Data, by SHA-256:\n\n" + _block("text", lines)


def _flags(settings: SftConfig) -> Iterator[str]:
    """The settings that are not the default, without folders of the machine."""
    usual = SftConfig()
    for spec in dataclasses.fields(SftConfig):
        name, value = spec.name, getattr(settings, spec.name)
        is_usual = value == getattr(usual, name) or value is None
        if is_usual or name in LEFT_OUT or spec.metadata["scope"] != "run":
            continue
        values = value if isinstance(value, tuple) else (value,)
        if name in PATHS:
            values = tuple(map(_without_folder, values))
        text = " ".join(shlex.quote(_plain(_word(item))) for item in values)
        yield f"{flag(name)} {text}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _without_folder(value: str) -> str:
    """The last name of a path; an id of a hub, and the choice of records, stay."""
    is_path = re.match(r"[/~.\\]|[A-Za-z]:\\", value) or value.endswith(ENDING)
    return Path(value).name if is_path else value


def _results(source: Source) -> Iterator[str]:
    """Figures of the base and of what is shared, where the run has both."""
    found = {row["step"]: row for row in source.rows}
    if source.step not in found:
        return
    base, tuned = found.get(0, {}), found[source.step]
    rows = [("validation loss, nats per token", "val_loss")]
    if "val_score" in tuned and source.settings and source.settings.eval_metric:
        rows.append((f"{name_of(source.settings.eval_metric)} of answers", "val_score"))
    lines = ["| of the validation records | base | this model |", "|---|---:|---:|"]
    for name, key in rows:
        before = f"{base[key]:.4f}" if key in base else ""
        lines.append(f"| {_plain(name)} | {before} | {tuned[key]:.4f} |")
    yield f"## Results\n\nAfter {source.step:,} steps:\n\n" + "\n".join(lines)


def _licence(source: Source, licence: Mapping[str, str]) -> str:
    if source.base is None:
        return ""
    text = f"What is made from a model is under its licence: that of {_plain(source.base_name)}"
    if licence:
        named = ", ".join(map(str, licence.values()))
        return f"## Licence\n\n{text}, which states: {_plain(named)}."
    return f"## Licence\n\n{text}, which vlft has not found; name it in the header of this file."


def _block(language: str, lines: list[str]) -> str:
    return f"```{language}\n" + "\n".join(lines) + "\n```"


def _plain(text: str) -> str:
    """A text in one line, without what ends a block of code."""
    return " ".join(printable(text).replace("`", "'").split())
