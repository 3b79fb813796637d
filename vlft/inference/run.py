"""``vlft infer``: answers of a checkpoint or a model to a data set, or a chat with it."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlft import __version__, console
from vlft.checkpoints.identity import small_files
from vlft.data.documents import Pages, open_documents
from vlft.data.image_notes import list_notes
from vlft.data.skipped import as_row
from vlft.data.specs import expand, parse_spec
from vlft.errors import ConfigError, shown
from vlft.files import digest
from vlft.inference.answer import answer
from vlft.inference.chat import chat
from vlft.inference.data import load_records
from vlft.inference.formats import text_of
from vlft.inference.generate import Sampling
from vlft.inference.model import find_model, load_for_chat, placement_of, treat_images
from vlft.inference.results import ResultFile, read_results
from vlft.inference.saved_text import SavedText
from vlft.inference.side_by_side import find_sides, load_repliers
from vlft.settings import check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vlft.checkpoints.locate import ModelFolder
    from vlft.checkpoints.placement import Placement
    from vlft.checkpoints.tuned import Tuned
    from vlft.config import InferConfig
    from vlft.data.dataset import Dataset
    from vlft.data.documents import Document
    from vlft.families.image_settings import ImageSettings
    from vlft.families.processor import Processor

# Settings that older result files do not name, and what they were without them.
NEWER = {"no_repeat_ngram": 0, "ngram_window": None, "stop": (), "num_beams": 1}


@dataclass(frozen=True)
class InferResult:
    """The result file of answering a data set, and the number of its lines."""

    output: Path
    count: int

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All lines; each call reads the file."""
        return read_results(self.output)


def run_infer(config: InferConfig) -> InferResult | None:
    """Answers a data set; without one, chats at the terminal and returns None.

    Raises:
        VlftError: bad input.
    """
    config = check(config)
    tuned, folder = find_model(config)
    sides = find_sides(config, tuned)
    treatment, processor = treat_images(config, tuned, folder)
    sampling = _sampling(config).resolved(processor.family)
    _check_for_checkpoint(config, tuned, processor)
    strict = config.on_bad_sample == "error"
    documents = open_documents(config.image, config.pdf_dpi, strict=strict)
    data = load_records(config, tuned, processor, documents)
    if config.image_root is not None and data and not data.images():
        console.warn("--image-root has no effect: the data holds no images")
    torch.manual_seed(config.seed)
    placement = placement_of(config, tuned)
    if data is None:
        model, switch = load_for_chat(config, folder, tuned, placement)
        given: Any = {"system": config.system, "allow_private": config.allow_private_urls}
        chat(model, processor, sampling, lines=sys.stdin, switch=switch, **given)
        return None
    header = _header(config, sampling, treatment, folder, tuned, sides, data, placement)
    system = processor.chat.system_prompt
    results = ResultFile(
        _output(config, folder, tuned, len(sides)),
        {**header, "documents": [str(document.path.absolute()) for document in documents]},
        data.conversations,
        system,
        form=config.format,
        overwrite=config.overwrite,
        sides=tuple(sides),
    )
    read = [parse_spec(spec)[0] for spec in config.dataset]
    with results.held([*read, *(document.path for document in documents)]):
        results.resume()
        texts = _saved_text(config, documents, data, results)
        if results.done < results.total:
            repliers = load_repliers(
                config, folder, tuned, sides, placement, processor, sampling, data.images()
            )
            answer(repliers, processor, data, Pages(documents), results, texts, config)
    _report(config, data, results, texts)
    return InferResult(results.path, results.done)


def _sampling(config: InferConfig) -> Sampling:
    """How replies are generated."""
    given = {field.name: getattr(config, field.name) for field in fields(Sampling)}
    return Sampling(**{**given, "stop": tuple(text.replace("\\n", "\n") for text in config.stop)})


def _written(sampling: Sampling) -> dict[str, Any]:
    """The settings of replies as a header has them."""
    values = {k: v for k, v in asdict(sampling).items() if k not in NEWER or v != NEWER[k]}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _saved_text(
    config: InferConfig, documents: Sequence[Document], data: Dataset, results: ResultFile
) -> SavedText | None:
    """The text files of the documents, if they are asked for, with those answered before."""
    if config.save_text is None:
        return None
    texts = SavedText(config.save_text, documents, data.conversations)
    done = read_results(results.path, results.done) if results.done else []
    texts.begin(
        [text_of(row["response"], config.format) for row in done], overwrite=config.overwrite
    )
    return texts


def _report(
    config: InferConfig, data: Dataset, results: ResultFile, texts: SavedText | None
) -> None:
    """Shows the first replies, and says what was written and left out."""
    _show_rows(read_results(results.path, config.show_samples), config.format)
    if data.skipped:
        named = shown(results.header_path)
        console.info(f"records that were skipped: {len(data.skipped)}, see {named}")
    if texts is not None:
        texts.finish()
    console.info(f"{results.done} replies in {shown(results.path)}")


def _header(
    config: InferConfig,
    sampling: Sampling,
    treatment: ImageSettings,
    folder: ModelFolder,
    tuned: Tuned | None,
    sides: Mapping[str, Tuned],
    data: Dataset,
    placement: Placement,
) -> dict[str, Any]:
    """Settings, model and data of the answers; only a file with an equal header is continued."""
    adapter = tuned.adapter if tuned else None
    files = {path.name: path for path in adapter.glob("adapter_*")} if adapter else {}
    if sides:
        folders = ((name, one.checkpoint) for name, one in sides.items())
        files = {f"{n}/{file.name}": file for n, f in folders for file in f.glob("adapter_*")}
    return {
        "vlft": __version__,
        "settings": {
            **_written(sampling),
            "seed": config.seed,
            "dtype": str(placement.dtype).removeprefix("torch."),
            "quantize": placement.quantize,
            "merge_lora": config.merge_lora,
            **treatment.changed,
            # Recorded only if the data hold such tokens: files of older releases are continued.
            **({"special_tokens": "text"} if data.as_text else {}),
            **({} if config.format == "text" else {"format": config.format}),
            **({"label_loss": True} if config.label_loss else {}),
        },
        "model": {
            "name": folder.name,
            "weights": folder.weights_digest,
            "files": small_files(folder.path),
        },
        "adapter": {name: digest(path) for name, path in sorted(files.items())},
        "checkpoint": str(tuned.checkpoint) if tuned and not sides else None,
        **({"checkpoints": {n: str(one.checkpoint) for n, one in sides.items()}} if sides else {}),
        "dataset": sorted({str(path.absolute()) for path in data.files()}),
        "skipped": [as_row(error) for error in data.skipped],
        "image_notes": list_notes(data.with_notes()),
    }


def _check_for_checkpoint(config: InferConfig, tuned: Tuned | None, processor: Processor) -> None:
    """Says, or raises ConfigError, if this checkpoint leaves a setting without effect."""
    if config.merge_lora and tuned is not None and tuned.adapter is None:
        raise ConfigError(
            "the checkpoint holds a whole model, there is nothing to merge",
            place="--merge-lora",
            hint="leave it out",
        )
    if (config.max_new_tokens or 0) > processor.max_length:
        console.warn(
            f"--max-new-tokens {config.max_new_tokens}: prompt and reply together have at most "
            f"{processor.max_length} tokens"
        )


def _show_rows(rows: list[dict[str, Any]], form: str) -> None:
    """Prints prompt, output, label and images of result lines to stdout."""
    titles = {"query": "prompt", "response": "output", "label": "label", "images": "images"}
    for line in rows:
        row = {**line, "response": text_of(line["response"], form)}
        for key, title in titles.items():
            value = ", ".join(map(shown, row[key])) if key == "images" else row.get(key)
            if value not in (None, ""):
                console.reply(f"[{title}] {value}\n")
        console.reply("\n")


def _output(config: InferConfig, folder: ModelFolder, tuned: Tuned | None, sides: int) -> Path:
    """The result file: --output, or a file in the run folder named after checkpoint and data."""
    if config.output is not None:
        return config.output
    data = "documents" if config.image else "val"
    if config.dataset:
        data = parse_spec(expand(config.dataset)[0])[0].name.removesuffix(".jsonl")
    if tuned is not None:
        merged = "-merged" if config.merge_lora else ""
        folder_of_results = tuned.checkpoint.parent / "infer"
        if folder_of_results.is_symlink():
            hint = "name a file with --output"
            raise ConfigError("a link", place=shown(folder_of_results), hint=hint)
        name = f"{sides}-checkpoints" if sides else f"{tuned.checkpoint.name}{merged}"
        return folder_of_results / f"{name}-{data}.jsonl"
    return Path("output") / "infer" / f"{Path(folder.name).name}-{data}.jsonl"
