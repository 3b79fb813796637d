"""Settings of vlft infer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.shared import (
    ATTENTION,
    DEVICES,
    DTYPES,
    EXIF,
    HUBS,
    QUANTIZE,
    ReadingSettings,
    hub_rules,
    image_mode_setting,
    makers,
    max_image_tokens_setting,
    max_tiles_setting,
    special_tokens_setting,
)
from vlft.errors import LONE_SURROGATE
from vlft.settings import Rule, changed, given

if TYPE_CHECKING:
    from collections.abc import Sequence

# Dividing scores by a lower temperature may overflow.
LOWEST_TEMPERATURE = 1e-4

_model, _data, _run, _generation = makers("Model", "Data", "Run", "Generation")


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class InferConfig(ReadingSettings):
    """Settings of ``vlft infer``."""

    ckpt_dir: tuple[Path, ...] = _model(
        (), "Run folder of vlft sft, or a checkpoint-N in it. Repeatable: adapters of one base "
        "answer side by side in one file.")
    model: str | None = _model(None, "Base model of the adapter, or a model to run without one.",
                               path=True, default_text="the checkpoint's")
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)
    dtype: str = _model("auto", "Data type of the weights. auto: as in training.", choices=DTYPES)
    device: str = _model("auto", "Device to run on.", choices=DEVICES)
    quantize: str | None = _model(
        None, "Store the LLM in 4 or 8 bit.", choices=QUANTIZE, default_text="as in training")
    attn: str = _model("auto", "Attention implementation.", choices=ATTENTION)
    merge_lora: bool = _model(False, "Merge the adapter into the weights before the first reply.")
    vision_cache: str = _model("auto", "Features of images that vlft sft has left on disk. auto: "
                               "use them.", choices=("auto", "off"))
    accept_changes: bool = _model(False, "Use the adapter although the model has other weights "
                                  "than its base.")

    load_dataset_config: bool = _data(False, "Answer the validation set of the run in --ckpt-dir.")
    dataset: tuple[str, ...] = _data(
        (), "Answer the records of these files. Repeatable.", path=True, records=True)
    image: tuple[str, ...] = _data(
        (), "Answer --query for these images and each page of these PDF files; patterns like "
        "'scans/*.jpg' are allowed. Repeatable.", path=True)
    query: str | None = _data(
        None, "What is asked about each page of --image; \\n in it is a new line.",
        default_text="required with --image")
    pdf_dpi: int = _data(
        200, "Dots per inch of the pages of PDF files.", minimum=10, maximum=2400)
    pages_per_prompt: int = _data(
        1, "Pages of a PDF file that are asked about at once, for models that read several.",
        minimum=1, maximum=1000)
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the data file's folder")
    confine_images: Path | None = _data(None, "The only folder that images are read from.",
                                        default_text="any")
    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    exif: str | None = _data(None, "Turn images as their EXIF orientation says.", choices=EXIF,
                             default_text="as in training")
    image_mode: str | None = image_mode_setting("as in training")
    max_tiles: int | None = max_tiles_setting("as in training")
    max_image_tokens: int | None = max_image_tokens_setting("as in training")
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))
    special_tokens: str | None = special_tokens_setting(None)
    system: str | None = _data(
        None, "System prompt of a chat; empty for none.", default_text="the family's")

    max_new_tokens: int | None = _generation(
        None, "Longest reply, in tokens.", minimum=1, default_text="512; 8192 for DeepSeek-OCR; "
        "32768 for Unlimited-OCR")
    temperature: float = _generation(0.0, "0 decodes greedily, above 0 samples.", minimum=0)
    top_p: float = _generation(1.0, "Sample from the likeliest tokens of this total probability.",
                               above=0, maximum=1)
    top_k: int = _generation(0, "Sample from the k likeliest tokens; 0 from all.", minimum=0)
    repetition_penalty: float = _generation(
        1.0, "Above 1 makes repeated tokens less likely.", minimum=0.01, maximum=100)
    repetition_context: str = _generation(
        "reply", "What counts as said before: the reply alone, as in the authors' chats, or the "
        "prompt too.", choices=("reply", "all"))
    no_repeat_ngram: int | None = _generation(
        None, "Ban tokens that would repeat so many tokens, prompt included; 0 bans none.",
        minimum=0, maximum=1000, default_text="20 for DeepSeek-OCR, 35 for "
        "Unlimited-OCR, else 0")
    ngram_window: int | None = _generation(
        None, "Ban repetitions within so many last tokens of the reply alone; <td> and </td> of "
        "DeepSeek-OCR may repeat.", minimum=1, default_text="128 for Unlimited-OCR, else all")
    num_beams: int = _generation(
        1, "Beams of a beam search, which finds likelier replies than greedy decoding; each takes "
        "the memory of a record of its own.", minimum=1, maximum=100)
    stop: tuple[str, ...] = _generation(
        (), "End a reply before the first of these texts; \\n in one is a new line. Repeatable.")
    format: str = _generation(
        "text", "What becomes of <|ref|> and <|det|> in replies. markdown: results also have the "
        "text without these tags; blocks: its parts, with type and boxes in pixels.",
        choices=("text", "markdown", "blocks"))
    label_loss: bool = _generation(
        False, "Write the loss of each record's right reply too, for the metric perplexity.")
    batch_size: int = _generation(8, "Records answered together.", minimum=1)
    prefill_chunk: int | None = _generation(
        None, "Tokens of prompts that run at once; fewer take less memory, replies are the same.",
        minimum=1, default_text="2048 on the CPU, 8192 on a GPU")
    seed: int = _generation(42, "Random seed of sampling.", minimum=0)

    output: Path | None = _run(None, "Result file (.jsonl).", default_text="beside the checkpoint")
    save_text: Path | None = _run(
        None, "Folder for a text file (.md) of each document of --image.", default_text="none")
    overwrite: bool = _run(False, "Start the result file anew instead of continuing it.")
    show_samples: int = _run(3, "Replies printed in full.", minimum=0)

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        answers_run, has_adapter = self.load_dataset_config, bool(self.ckpt_dir)
        is_chat = not (answers_run or self.dataset or self.image)
        needy = changed(self, "merge_lora", "accept_changes")
        answering = given(self, "image_root", "confine_images", "on_bad_sample",
                           "batch_size", "prefill_chunk", "vision_cache",
                            "output", "overwrite", "show_samples", "format", "label_loss")
        return (
            *_document_rules(self),
            (answers_run and self.dataset, "--load-dataset-config",
             "found together with --dataset; one of the two is allowed", "leave one of them out"),
            (answers_run and not has_adapter, "--load-dataset-config",
             "needs the run whose validation set it answers",
             "add --ckpt-dir output/.../checkpoint-N"),
            (answers_run and self.on_bad_sample != "error", "--on-bad-sample",
             "found together with --load-dataset-config, which reads the data as the run did",
             "leave one of them out"),
            (self.merge_lora and self.quantize not in (None, "none"), "--quantize",
             f"found {self.quantize} with --merge-lora, which merges into whole weights",
             "leave one of them out"),
            (self.system is not None and not is_chat, "--system",
             "belongs to a chat; each record has its own system prompt",
             'write "system" into the records'),
            (self.system and LONE_SURROGATE.search(self.system), "--system",
             "not UTF-8", "type the text as UTF-8, or set the terminal to it"),
            (is_chat and answering, answering, "only for answers to a data set, found a chat",
             "leave it out, or add --dataset, --image or --load-dataset-config"),
            *_generation_rules(self),
            *_side_rules(self, is_chat=is_chat),
            (needy and not has_adapter, needy, "needs an adapter", "add --ckpt-dir"),
            *hub_rules(self, self.model),
        )


def _side_rules(config: InferConfig, *, is_chat: bool) -> Sequence[Rule]:
    """The rules of several checkpoints in one file."""
    several = len(config.ckpt_dir) > 1
    found = f"found {len(config.ckpt_dir)} checkpoints"
    return (
        (several and is_chat, "--ckpt-dir", f"{found}, a chat is with one", "name one"),
        (several and config.merge_lora, "--merge-lora",
         f"{found}, whose adapters are switched", "leave it out"),
        (several and config.save_text, "--save-text",
         f"{found}; a text file is of one", "leave it out, or name one checkpoint"),
    )


def _generation_rules(config: InferConfig) -> Sequence[Rule]:
    """The rules of how the tokens of replies are chosen."""
    return (
        (config.temperature == 0 and (config.top_p != 1 or config.top_k != 0), "--temperature",
         "top-p and top-k choose among samples, found temperature 0 (greedy)",
         "add e.g. --temperature 0.7"),
        (0 < config.temperature < LOWEST_TEMPERATURE, "--temperature",
         f"found {config.temperature:g}, 0 (greedy) or at least {LOWEST_TEMPERATURE:g} is "
         "allowed", "use 0 for the likeliest token"),
        (config.repetition_penalty == 1, given(config, "repetition_context"),
         "--repetition-penalty is 1", None),
        (config.num_beams > 1 and config.temperature > 0, "--num-beams",
         f"found {config.num_beams} with --temperature {config.temperature:g}; a beam search draws "
         "no samples", "leave one of them out"),
        ("" in config.stop, "--stop", "found an empty text, which ends every reply at once",
         "leave it out"),
        (LONE_SURROGATE.search("".join(config.stop)), "--stop",
         "not UTF-8", "type the text as UTF-8, or set the terminal to it"),
        (config.no_repeat_ngram == 0, given(config, "ngram_window"),
         "--no-repeat-ngram is 0", None),
    )


def _document_rules(config: InferConfig) -> Sequence[Rule]:
    """The rules of documents that are answered without a data file."""
    records = given(
        config,
        *(field.name for field in fields(ReadingSettings)),
        *("image_root", "confine_images", "allow_private_urls"),
    )
    documents = given(config, "query", "pdf_dpi", "pages_per_prompt", "save_text")
    asked = (config.query or "").strip()
    return (
        (config.image and (config.dataset or config.load_dataset_config), "--image",
         "found together with --dataset or --load-dataset-config; one of them is allowed",
         "leave one of them out"),
        (config.image and not asked, "--query", "nothing is asked about the images",
         "add e.g. --query '<image>\\nFree OCR.'"),
        (config.image and records, records, "only for records of data files, found --image",
         "leave it out"),
        (not config.image and documents, documents, "only for --image",
         "add --image, or leave it out"),
    )  # fmt: skip
