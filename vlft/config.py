"""Every setting, once: its name, default, help and limits.

The flags of the command line, the keys of ``--config FILE``, the saved ``run_config.json`` and the
Python API are all made from these dataclasses.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.errors import LONE_SURROGATE
from vlft.gpus import GPU_HINT, find_gib
from vlft.settings import Rule, Settings, changed, given, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZE = ("none", "nf4", "int8")
ATTENTION = ("auto", "sdpa", "eager")
LAYOUTS = ("auto", "messages", "list", "completion", "query")
IMAGE_MODES = ("tiny", "small", "base", "large", "gundam")
HUBS = ("huggingface", "modelscope")
EXIF = ("auto", "rotate")
INIT_LORA = ("default", "gaussian", "orthogonal", "olora", "pissa")

# The default of --tokens-per-microbatch. On a GPU it is only where training starts to look for the
# longest row that fits.
TOKENS_PER_ROW = {"cpu": 4096, "cuda": 8192}
# Samples that share little are packed into a row up to this many tokens. On a CPU this is enough
# to make the matrix products efficient, and longer rows would only take more memory.
JOINED_TOKENS = {"cpu": 1024, "cuda": sys.maxsize}

# The default of --learning-rate, by --tuner.
LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}

# Dividing scores by a lower temperature may overflow.
LOWEST_TEMPERATURE = 1e-4

# Why an initialisation of LoRA needs weights that are not quantised.
NEEDS_WHOLE_WEIGHTS = {
    "orthogonal": "peft gives the LoRA weights the dtype of the base's, which is an integer in",
    "olora": "it changes the base weights as well, and these cannot be changed in",
    "pissa": "it changes the base weights as well, and these cannot be changed in",
}
# What --tuner full has no use for.
LORA_ONLY = (
    "lora_target_modules", "lora_rank", "lora_alpha", "lora_dropout", "use_dora", "use_rslora",
    "init_lora_weights",
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

# The panels of --help, in order.
PANELS = ("Model", "Data", "Reading", "Tuning", "Optimisation", "Run", "Generation", "Output")
_model, _data, _reading, _tuning, _optim, _run, _generation, _output = (
    partial(setting, panel=panel) for panel in PANELS
)


def _image_mode(default: str) -> Any:
    return _data(
        None,
        "How a page becomes views, for DeepSeek-OCR, and small, base, gundam for DeepSeek-OCR-2.",
        choices=IMAGE_MODES,
        default_text=default,
    )


def _max_tiles(default: str) -> Any:
    return _data(
        None,
        "Most tiles of an image, for DeepSeek-VL2 and DeepSeek-OCR.",
        minimum=1,
        default_text=default,
    )


def _max_image_tokens(default: str) -> Any:
    return _data(
        None,
        "Most tokens of an image, for DeepSeek-VL2 and DeepSeek-OCR.",
        minimum=1,
        default_text=default,
    )


def _special_tokens(default: str | None) -> Any:
    return _data(
        default,
        "Special tokens that data writes, as <|User|>. text: plain text; keep: tokens, as in the "
        "authors' code.",
        choices=("text", "keep"),
        default_text="text" if default else "as in training",
    )


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class ReadingSettings(Settings):
    """How data files are read, for all commands that read them."""

    layout: str = _reading("auto", "Layout of the records.", choices=LAYOUTS)
    columns: tuple[str, ...] = _reading(
        (), "Columns by what they are, e.g. response=label,images=photo. Left of = stand "
        "messages, query, response, images, system or history.", default_text="the usual names")
    prompt: str | None = _reading(None, "Question of records without one, e.g. captions.")
    answers: str | None = _reading(
        None, "Which of several reference answers is the reply.", choices=("first", "most", "each"),
        default_text="asked")
    preference: str | None = _reading(
        None, "Which reply of a preference pair is the reply.", choices=("chosen",),
        default_text="asked")
    objects: str | None = _reading(
        None, "What becomes of boxes that no tag in the texts places: they are the reply, or are "
        "dropped.", choices=("reply", "drop"), default_text="asked")
    qa: str = _reading("turns", "Whether the questions of a record are turns of one dialogue or "
                       "samples of their own.", choices=("turns", "samples"))


@dataclass(frozen=True, kw_only=True)
class SftConfig(ReadingSettings):
    """Settings of ``vlft sft``."""

    model: str | None = _model(
        None, "Model folder or hub id.", path=True, default_text="the tiny model in sample_data")
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)
    dtype: str = _model("auto", "Data type of the weights. auto: float32 on the CPU, the "
                        "checkpoint's on a GPU.", choices=DTYPES)
    device: str = _model("auto", "Device to run on.", choices=DEVICES)
    quantize: str = _model("none", "Store the frozen LLM in 4 or 8 bit (QLoRA).", choices=QUANTIZE)
    attn: str = _model("auto", "Attention implementation; flex needs a GPU. auto: sdpa along the "
                       "prefix trees.", choices=(*ATTENTION, "flex"))

    dataset: tuple[str, ...] = _data(
        (), "Training data: JSON, CSV or parquet. FILE#N or FILE#20% draws records. Repeatable.",
        path=True, records=True, default_text="required")
    val_dataset: tuple[str, ...] = _data((), "Validation data. Repeatable.", path=True,
                                         records=True)
    val_ratio: float = _data(0.05, "Share split off for validation where --val-dataset is not "
                             "given.", minimum=0, maximum=0.9)
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the data file's folder")
    confine_images: Path | None = _data(None, "The only folder that images are read from.",
                                        default_text="any")
    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    exif: str = _data("auto", "Turn images as their EXIF orientation says. auto: only where the "
                      "authors' code does.", choices=EXIF)
    image_mode: str | None = _image_mode("the checkpoint's")
    max_tiles: int | None = _max_tiles("the checkpoint's")
    max_image_tokens: int | None = _max_image_tokens("the checkpoint's")
    max_length: int | None = _data(
        None, "Longest sample, in tokens.", minimum=8, default_text="the model's")
    on_long: str = _data("error", "What to do with a longer sample.",
                         choices=("error", "skip", "truncate-history"))
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))
    loss_on: str = _data("all", "Which replies of a dialogue are trained.", choices=("all", "last"))
    special_tokens: str = _special_tokens("text")

    adapter: Path | None = _tuning(
        None, "Start from this adapter, a run, a checkpoint or a folder of peft's, on new data. It "
        "says what has LoRA, and --model is its own if not given.", default_text="a new one")
    tuner: str = _tuning("lora", "Train LoRA adapters or all weights.", choices=("lora", "full"))
    lora_target_modules: str = _tuning(
        "qkv", "Layers with LoRA: qkv, ALL, names with commas between, or a regular expression.")
    lora_rank: int = _tuning(8, "LoRA rank.", minimum=1)
    lora_alpha: float = _tuning(32.0, "LoRA alpha; the update is scaled by alpha / rank.", above=0)
    lora_dropout: float = _tuning(0.0, "Dropout on the input of LoRA layers. Its masks depend on "
                                  "packing and sharing.", minimum=0, maximum=0.95)
    use_dora: bool = _tuning(False, "DoRA: train magnitude and direction separately.")
    use_rslora: bool = _tuning(False, "rsLoRA: scale by alpha / sqrt(rank).")
    init_lora_weights: str = _tuning(
        "default", "Initialisation of the LoRA weights.", choices=INIT_LORA)
    train_aligner: bool = _tuning(False, "Train the aligner too.")
    train_vision: bool = _tuning(False, "Train the vision towers too.")

    num_train_epochs: int = _optim(3, "Passes over the training data.", minimum=1)
    max_steps: int | None = _optim(None, "Optimiser steps in all, in as many epochs as it takes.",
                                   minimum=1, default_text="by epochs")
    batch_size: int = _optim(16, "Samples per optimiser step, on all GPUs together.", minimum=1)
    tokens_per_microbatch: int | None = _optim(
        None, "Most tokens in a packed row; bounds the memory. With dropout results depend on it.",
        minimum=1, auto=True, default_text=f"auto: {TOKENS_PER_ROW['cpu']}, on a GPU what fits")
    learning_rate: float | None = _optim(
        None, "Peak learning rate.", above=0, default_text="1e-4; 1e-5 for full")
    lr_scheduler: str = _optim("cosine", "Course of the learning rate after the warm-up.",
                               choices=("cosine", "linear", "constant"))
    warmup_ratio: float = _optim(
        0.05, "Share of the steps with a linear warm-up.", minimum=0, maximum=1)
    weight_decay: float = _optim(0.1, "AdamW weight decay.", minimum=0)
    max_grad_norm: float = _optim(
        1.0, "Clip gradients to this norm; 0 disables clipping.", minimum=0)
    gradient_checkpointing: bool | None = _optim(
        None, "Recompute activations in the backward pass to save memory.",
        default_text="auto: on a GPU, where rows do not fit without", resumable=True)
    share_prefix: bool = _optim(True, "Compute each shared prompt prefix once per row.")
    vision_cache: str = _optim(
        "auto", "Where image features are kept while the vision towers are frozen.",
        choices=("auto", "disk", "memory", "off"), resumable=True)
    seed: int = _optim(42, "Random seed of sampling, shuffling and initialisation.", minimum=0)

    output_dir: Path = _run(Path("output"), "Folder that run folders are written to.")
    save_steps: int | None = _run(None, "Optimiser steps between checkpoints.", minimum=1,
                                  default_text="each epoch")
    eval_steps: int | None = _run(None, "Optimiser steps between evaluations.", minimum=1,
                                  default_text="as save-steps")
    save_total_limit: int | None = _run(3, "Newest checkpoints to keep, besides the best.",
                                        minimum=1, resumable=True)
    logging_steps: int = _run(1, "Optimiser steps between log lines.", minimum=1, resumable=True)
    early_stop: int | None = _run(
        None, "Stop after this many evaluations without a lower validation loss.", minimum=1,
        default_text="never")
    report_to: str = _run("none", "Tracker to log to as well.",
                          choices=("none", "tensorboard", "wandb"), resumable=True)
    resume: Path | None = _run(None, "Run or checkpoint folder to continue.", scope="flag")
    overwrite: bool = _run(False, "With --resume: remove the run's checkpoints after the resumed "
                           "one.", scope="flag")
    accept_changes: bool = _run(False, "With --resume or --adapter: go on although images or the "
                                "base model have changed; a resumed run records it.", scope="flag")
    show_sample: bool = _run(True, "Print one encoded sample before training.", scope="command")

    def rules(self) -> Sequence[Rule]:
        """Combinations of settings that cannot act; ``build`` checks each value alone."""
        full, quantized = self.tuner == "full", self.quantize != "none"
        start, lora = self.init_lora_weights, given(self, *LORA_ONLY)
        of_adapter = given(self, *LORA_ONLY, "train_aligner", "train_vision")
        return (
            (not self.dataset and self.resume is None, "--dataset", "no training data given",
             "name a .jsonl, .json, .csv or .parquet file, e.g. --dataset train.jsonl"),
            (full and quantized, "--quantize",
             f"found {self.quantize} with --tuner full; quantised weights cannot train",
             "use --tuner lora, or --quantize none"),
            (full and lora, lora, "only with --tuner lora, found full",
             "leave it out, or use --tuner lora"),
            (full and self.adapter, "--adapter", "only with --tuner lora, found full",
             "merge it first, with vlft merge-lora"),
            (self.adapter and of_adapter, of_adapter, "the adapter says it", "leave it out"),
            (start == "orthogonal" and self.lora_rank % 2, "--lora-rank",
             f"found {self.lora_rank} with --init-lora-weights orthogonal; it takes an even rank",
             ""),
            (start in NEEDS_WHOLE_WEIGHTS and quantized, "--init-lora-weights",
             f"found {start}; {NEEDS_WHOLE_WEIGHTS.get(start)} {self.quantize}",
             "use default or gaussian with --quantize"),
            *(_hub_rules(self, self.model) if self.resume is None else ()),
            self.lacks_validation(self.val_dataset or self.val_ratio),
            (self.val_dataset and self.val_ratio, given(self, "val_ratio"),
             "--val-dataset is given", None),
            (self.max_steps, given(self, "num_train_epochs"), "--max-steps is given", None),
            (self.train_vision and self.vision_cache in ("disk", "memory"), "--vision-cache",
             "--train-vision changes the features in every step", None),
            (self.resume is None, given(self, "overwrite"),
             "only --resume meets checkpoints; a new run gets a folder of its own", None),
            (self.resume is None and self.adapter is None, given(self, "accept_changes"),
             "a new run has nothing that could have changed", None),
        )

    def lacks_validation(self, found: object) -> Rule:
        """The rule of settings that need validation data: they do not act where none is found."""
        flags = given(self, "early_stop", "eval_steps")
        hint = "name --val-dataset or raise --val-ratio"
        return flags and not found, flags, "needs validation data", hint

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the run; --max-steps overrides the number of epochs."""
        return self.max_steps or self.num_train_epochs * steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class PlanConfig(SftConfig):
    """Settings of ``vlft plan``: those of the run that is planned, and the GPU."""

    gpu: str = setting(
        "24GB", "GPU to plan for: its memory, or a name like a100 or 4090.", panel="Plan")

    def rules(self) -> Sequence[Rule]:
        """Those of a run, for which data is optional, and those of a plan."""
        return (
            *(rule for rule in super().rules() if rule[1] != "--dataset"),
            (self.adapter, "--adapter", "only for vlft sft; a plan is of a new adapter",
             "give its settings: --lora-rank, --lora-target-modules"),
            (self.resume, "--resume", "only for vlft sft; a plan is of a new run",
             "give the settings of the run: --config RUN/run_config.json"),
            (self.val_dataset and not self.dataset, "--val-dataset", "needs training data",
             "add --dataset"),
            (not find_gib(self.gpu), "--gpu", f"found {self.gpu!r}", GPU_HINT),
            (self.device == "cpu", given(self, "gpu"), "--device cpu is given", None),
            (self.is_overview and self.tuner == "full", "--tuner",
             "found full; the table of all models is of LoRA", "name one with --model"),
            (self.is_overview, given(self, "quantize", "lora_target_modules"),
             "the table of all models shows qkv and ALL, with and without nf4; name one with "
             "--model", None),
        )

    @property
    def is_overview(self) -> bool:
        """Whether all published models are planned."""
        return self.model is None and not self.dataset


@dataclass(frozen=True, kw_only=True)
class InferConfig(ReadingSettings):
    """Settings of ``vlft infer``."""

    ckpt_dir: Path | None = _model(None, "Run folder of vlft sft, or a checkpoint-N in it.")
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
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the data file's folder")
    confine_images: Path | None = _data(None, "The only folder that images are read from.",
                                        default_text="any")
    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    exif: str | None = _data(None, "Turn images as their EXIF orientation says.", choices=EXIF,
                             default_text="as in training")
    image_mode: str | None = _image_mode("as in training")
    max_tiles: int | None = _max_tiles("as in training")
    max_image_tokens: int | None = _max_image_tokens("as in training")
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))
    special_tokens: str | None = _special_tokens(None)
    system: str | None = _data(
        None, "System prompt of a chat; empty for none.", default_text="the family's")

    max_new_tokens: int | None = _generation(
        None, "Longest reply, in tokens.", minimum=1, default_text="512; 8192 for DeepSeek-OCR")
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
        minimum=0, maximum=1000, default_text="20 for DeepSeek-OCR, else 0")
    ngram_window: int | None = _generation(
        None, "Ban repetitions within so many last tokens of the reply alone; <td> and </td> may "
        "repeat.", minimum=1, default_text="all tokens")
    format: str = _generation(
        "text", "What becomes of <|ref|> and <|det|> in replies. markdown: results also have the "
        "text without these tags; blocks: its parts, with type and boxes in pixels.",
        choices=("text", "markdown", "blocks"))
    batch_size: int = _generation(8, "Records answered together.", minimum=1)
    seed: int = _generation(42, "Random seed of sampling.", minimum=0)

    output: Path | None = _run(None, "Result file (.jsonl).", default_text="beside the checkpoint")
    save_text: Path | None = _run(
        None, "Folder for a text file (.md) of each document of --image.", default_text="none")
    overwrite: bool = _run(False, "Start the result file anew instead of continuing it.")
    show_samples: int = _run(3, "Replies printed in full.", minimum=0)

    def rules(self) -> Sequence[Rule]:
        """Combinations of settings that cannot act; ``build`` checks each value alone."""
        answers_run, has_adapter = self.load_dataset_config, self.ckpt_dir is not None
        is_chat = not (answers_run or self.dataset or self.image)
        needy = changed(self, "merge_lora", "accept_changes")
        answering = given(self, "image_root", "confine_images", "allow_private_urls",
                            "on_bad_sample", "batch_size", "output", "overwrite", "show_samples",
                            "format")
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
            (self.temperature == 0 and (self.top_p != 1 or self.top_k != 0), "--temperature",
             "top-p and top-k choose among samples, found temperature 0 (greedy)",
             "add e.g. --temperature 0.7"),
            (0 < self.temperature < LOWEST_TEMPERATURE, "--temperature",
             f"found {self.temperature:g}, 0 (greedy) or at least {LOWEST_TEMPERATURE:g} is "
             "allowed", "use 0 for the likeliest token"),
            (self.repetition_penalty == 1, given(self, "repetition_context"),
             "--repetition-penalty is 1", None),
            (self.no_repeat_ngram == 0, given(self, "ngram_window"),
             "--no-repeat-ngram is 0", None),
            (needy and not has_adapter, needy, "needs an adapter", "add --ckpt-dir"),
            *_hub_rules(self, self.model),
        )


@dataclass(frozen=True, kw_only=True)
class CheckConfig(ReadingSettings):
    """Settings of ``vlft check``."""

    dataset: tuple[str, ...] = _data(
        (), "Data files. FILE#N or FILE#20% draws records.", path=True, argument=True)
    val_dataset: tuple[str, ...] = _data(
        (), "Validation data: records and images that training has too are counted. Repeatable.",
        path=True)
    model: str | None = _data(None, "Model folder or hub id: lengths are counted in its tokens.",
                              path=True, default_text="none")
    max_length: int | None = _data(
        None, "Longest sample that vlft sft would take, in tokens.", minimum=8,
        default_text="the model's")
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the data file's folder")
    confine_images: Path | None = _data(None, "The only folder that images are read from.",
                                        default_text="any")
    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))
    loss_on: str = _data("all", "Which replies of a dialogue are trained.", choices=("all", "last"))
    seed: int = _data(42, "Random seed of FILE#N.", minimum=0)

    write: Path | None = _output(
        None, "File (.jsonl) for what was read, as messages; embedded images go into a folder "
        "beside it.", default_text="none")
    overwrite: bool = _output(False, "Replace the file of --write if it is there.")
    json: bool = _output(False, "Print the report as JSON.")

    def rules(self) -> Sequence[Rule]:
        """Combinations of settings that cannot act; ``build`` checks each value alone."""
        return (
            (not self.dataset, "vlft check", "no data given", "write vlft check train.jsonl"),
            (self.write and self.write.suffix != ".jsonl", "--write",
             f"found {self.write}, a name that ends in .jsonl is allowed", ""),
            (self.write is None, given(self, "overwrite"), "--write is not given", None),
            (self.model is None, given(self, "max_length"), "--model is not given", None),
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Settings of ``vlft data``."""

    src: tuple[str, ...] = _data(
        (), "COCO or RefCOCO JSON, PAGE or ALTO XML, or OmniDocBench JSON.", path=True,
        argument=True)
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the file's folder")
    prompt: str | None = _data(
        None, "Question of every record; <ref-object> stands for what is to be located.",
        default_text="as DeepSeek-OCR's authors ask")
    boxes: bool = _data(False, "Of pages: write the box of each line or part as well.")
    box_format: str | None = _data(
        None, "What the numbers of a bbox beside an expression are: two corners, or x, y, width, "
        "height.", choices=("xyxy", "xywh"), default_text="asked")
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))

    output: Path | None = _output(None, "File (.jsonl) for the records.", default_text="required")
    overwrite: bool = _output(False, "Replace the file of --output if it is there.")

    def rules(self) -> Sequence[Rule]:
        """Combinations of settings that cannot act; ``build`` checks each value alone."""
        return (
            (not self.src, "vlft data", "no file given",
             "write vlft data instances.json --output train.jsonl"),
            (self.output is None or self.output.suffix != ".jsonl", "--output",
             f"found {self.output or 'none'}, a name that ends in .jsonl is allowed", ""),
        )


@dataclass(frozen=True, kw_only=True)
class MergeLoraConfig(Settings):
    """Settings of ``vlft merge-lora``."""

    ckpt_dir: Path | None = _model(
        None, "Run folder of vlft sft, or a checkpoint-N in it.", default_text="required")
    model: str | None = _model(None, "Base model.", path=True, default_text="the run's")
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)
    base: str = _model(
        "dequantized", "Weights to add a QLoRA adapter to: the dequantized ones of its training, "
        "or the original.", choices=("dequantized", "original"))
    device: str = _model("cpu", "Device to merge on, in float32.", choices=DEVICES)
    accept_changes: bool = _model(False, "Merge although the model has other weights than the "
                                  "adapter's base.")

    output_dir: Path | None = _output(
        None, "New folder for the merged model.", default_text="CKPT_DIR-merged")
    format: str = _output("auto", "Layout of the files. original: the authors'. auto: the base's.",
                          choices=("auto", "original", "transformers"))
    dtype: str = _output(
        "auto", "Data type of the files. auto: that of the base's files.", choices=DTYPES)
    max_shard_size: str = _output("5GB", "Largest size of a weight file.")
    overwrite: bool = _output(False, "Replace the output folder if it is not empty.")

    def rules(self) -> Sequence[Rule]:
        """Combinations of settings that cannot act; ``build`` checks each value alone."""
        return (
            (self.ckpt_dir is None, "--ckpt-dir", "no adapter given",
             "name a run or a checkpoint-N folder of vlft sft"),
            *_hub_rules(self, self.model),
            _shard_size(self.max_shard_size),
        )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Settings of ``vlft convert``."""

    src: str | None = _model(None, "Model folder or hub id.", path=True, argument=True)
    dst: Path | None = _model(None, "New folder for the model.", argument=True)
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)

    model_roles: str = _model(
        "auto", "Names of user and assistant in Janus' chat text. words: User, Assistant, as "
        "Janus-1.3B; tokens: <|User|>, <|Assistant|>, as Janus-Pro; auto: what the files say.",
        choices=("auto", "words", "tokens"))

    format: str = _output("original", "Layout of the files. original: the authors'.",
                          choices=("original", "transformers"))
    dtype: str = _output(
        "auto", "Data type of the files. auto: that of each tensor.", choices=DTYPES)
    max_shard_size: str = _output("5GB", "Largest size of a weight file.")
    overwrite: bool = _output(False, "Replace the output folder if it is not empty.")

    def rules(self) -> Sequence[Rule]:
        """Combinations of settings that cannot act; ``build`` checks each value alone."""
        return (
            (self.src is None or self.dst is None, "vlft convert", "two folders are needed",
             "write vlft convert SRC DST --format transformers"),
            *_hub_rules(self, self.src),
            _shard_size(self.max_shard_size),
        )


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Settings):
    """``vlft models`` has no settings."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Settings of ``vlft cache``."""

    action: str = setting("info", "info lists what is kept, clear removes all of it.",
                          panel="Action", argument=True, choices=("info", "clear"))
# fmt: on


def _hub_rules(config: Any, model: str | None) -> tuple[Rule, Rule]:
    """The rules of what says where on a hub a model is, if no hub is asked for the model."""
    is_local = model is None or Path(model).is_dir()
    found = "only for a hub id, found a folder or no model"
    return (
        (is_local and config.revision, "--revision", found, "leave it out, or name a hub id"),
        (is_local, given(config, "hub"), found, None),
    )


def _document_rules(config: InferConfig) -> Sequence[Rule]:
    """The rules of documents that are answered without a data file."""
    records = given(
        config,
        *(field.name for field in fields(ReadingSettings)),
        *("image_root", "confine_images", "allow_private_urls"),
    )
    documents = given(config, "query", "pdf_dpi", "save_text")
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


def _shard_size(size: str) -> Rule:
    """The rule of a size: refused if it has another unit, or makes a file of each tensor."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])B", size.strip(), re.IGNORECASE)
    kilobytes = float(found[1]) * 1000 ** "KMGT".index(found[2].upper()) if found else 0
    hint = "write e.g. 5GB or 500MB; the units are KB, MB, GB and TB"
    return kilobytes < 1, "--max-shard-size", f"found {size!r}, at least 1KB is allowed", hint
