"""Settings of vlft sft and vlft plan."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.evaluation import METRIC_NAMES
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
from vlft.files import sample_folder
from vlft.gpus import GPU_HINT, find_gib
from vlft.settings import Rule, given, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

INIT_LORA = ("default", "gaussian", "orthogonal", "olora", "pissa")

# The default of --tokens-per-microbatch. On a GPU it is only where training starts to look for the
# longest row that fits.
TOKENS_PER_ROW = {"cpu": 4096, "cuda": 8192}
# Samples that share little are packed into a row up to this many tokens. On a CPU this is enough
# to make the matrix products efficient, and longer rows would only take more memory.
JOINED_TOKENS = {"cpu": 1024, "cuda": sys.maxsize}

# Perplexity is left out: it is the exponential of the validation loss, and that loss already
# chooses the best checkpoint where --eval-metric is not given.
ANSWER_METRICS = tuple(name for name in METRIC_NAMES if name != "perplexity")

# The default of --learning-rate, by --tuner.
LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}

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

_model, _data, _tuning, _optim, _run = makers("Model", "Data", "Tuning", "Optimisation", "Run")


# A table: one or two lines for a setting.
# fmt: off
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
    mix: str | None = _data(
        None, "Shares of the samples of an epoch, a number for each --dataset in order, e.g. "
        "0.7,0.3.", default_text="by their records")
    val_ratio: float = _data(0.05, "Share split off for validation where --val-dataset is not "
                             "given.", minimum=0, maximum=0.9)
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the data file's folder")
    confine_images: Path | None = _data(None, "The only folder that images are read from.",
                                        default_text="any")
    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    exif: str = _data("auto", "Turn images as their EXIF orientation says. auto: only where the "
                      "authors' code does.", choices=EXIF)
    image_mode: str | None = image_mode_setting("the checkpoint's")
    max_tiles: int | None = max_tiles_setting("the checkpoint's")
    max_image_tokens: int | None = max_image_tokens_setting("the checkpoint's")
    max_length: int | None = _data(
        None, "Longest sample, in tokens.", minimum=8, default_text="the model's")
    on_long: str = _data("error", "What to do with a longer sample.",
                         choices=("error", "skip", "truncate-history"))
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))
    loss_on: str = _data("all", "Which replies of a dialogue are trained.", choices=("all", "last"))
    special_tokens: str = special_tokens_setting("text")

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
    train_gen_aligner: bool = _tuning(False, "Train the aligner of drawn codes too, for Janus.")
    train_gen_head: bool = _tuning(False, "Train the head that draws too, for Janus.")

    num_train_epochs: int = _optim(3, "Passes over the training data; more of them extend a run "
                                   "with --resume.", minimum=1, on_resume="extends")
    max_steps: int | None = _optim(None, "Optimiser steps in all, in as many epochs as it takes.",
                                   minimum=1, default_text="by epochs", on_resume="extends")
    batch_size: int = _optim(16, "Samples per optimiser step, on all GPUs together.", minimum=1)
    tokens_per_microbatch: int | None = _optim(
        None, "Most tokens in a packed row; bounds the memory. With dropout results depend on it.",
        minimum=1, auto=True, default_text=f"auto: {TOKENS_PER_ROW['cpu']}, on a GPU what fits")
    learning_rate: float | None = _optim(
        None, "Peak learning rate.", above=0, default_text="1e-4; 1e-5 for full",
        on_resume="extends")
    lr_scheduler: str = _optim("cosine", "Course of the learning rate after the warm-up.",
                               choices=("cosine", "linear", "constant"), on_resume="extends")
    warmup_ratio: float = _optim(
        0.05, "Share of the steps with a linear warm-up.", minimum=0, maximum=1,
        on_resume="extends")
    weight_decay: float = _optim(0.1, "AdamW weight decay.", minimum=0)
    max_grad_norm: float = _optim(
        1.0, "Clip gradients to this norm; 0 disables clipping.", minimum=0)
    gradient_checkpointing: bool | None = _optim(
        None, "Recompute activations in the backward pass to save memory.",
        default_text="auto: on a GPU, where rows do not fit without", on_resume="free")
    compile: str = _optim(
        "auto", "Compile the LLM's layers, for speed. auto: on one GPU, for 1,000 steps or more.",
        choices=("auto", "off"), on_resume="free")
    cfg_dropout: float = _optim(
        0.1, "Share of the prompts of drawn images that each epoch leaves out, for guidance.",
        minimum=0, maximum=1)
    share_prefix: bool = _optim(True, "Compute each shared prompt prefix once per row.")
    vision_cache: str = _optim(
        "auto", "Where image features are kept while the vision towers are frozen.",
        choices=("auto", "disk", "memory", "off"), on_resume="free")
    seed: int = _optim(42, "Random seed of sampling, shuffling and initialisation.", minimum=0)

    output_dir: Path = _run(Path("output"), "Folder that run folders are written to.")
    save_steps: int | None = _run(None, "Optimiser steps between checkpoints.", minimum=1,
                                  default_text="each epoch")
    eval_steps: int | None = _run(None, "Optimiser steps between evaluations.", minimum=1,
                                  default_text="as save-steps")
    eval_metric: str | None = _run(
        None, "Score of answers to validation records, higher or lower as vlft eval has it, that "
        "decides about best and --early-stop.", choices=(*ANSWER_METRICS, "FILE.py"),
        default_text="the validation loss")
    eval_samples: int = _run(100, "Validation records that --eval-metric has answered.", minimum=1)
    save_total_limit: int | None = _run(3, "Newest checkpoints to keep, besides the best.",
                                        minimum=1, on_resume="free")
    logging_steps: int = _run(1, "Optimiser steps between log lines.", minimum=1, on_resume="free")
    early_stop: int | None = _run(
        None, "Stop after this many evaluations that are not the best so far.", minimum=1,
        default_text="never", on_resume="extends")
    report_to: str = _run("none", "Tracker to log to as well.",
                          choices=("none", "tensorboard", "wandb"), on_resume="free")
    resume: Path | None = _run(None, "Run or checkpoint folder to continue.", scope="flag")
    overwrite: bool = _run(False, "With --resume: remove the run's checkpoints after the resumed "
                           "one.", scope="flag")
    accept_changes: bool = _run(False, "With --resume or --adapter: go on although images or the "
                                "base model have changed; a resumed run records it.", scope="flag")
    show_sample: bool = _run(True, "Print one encoded sample before training.", scope="command")

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        full, quantized = self.tuner == "full", self.quantize != "none"
        start, lora = self.init_lora_weights, given(self, *LORA_ONLY)
        of_adapter = given(self, *LORA_ONLY, "train_aligner", "train_vision", "train_gen_aligner",
                           "train_gen_head")
        return (
            (not self.dataset and self.resume is None, "--dataset", "no training data given",
             "name a .jsonl, .json, .csv or .parquet file; one that works is "
             f"{sample_folder('handwriting') / 'train.jsonl'}"),
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
            *(hub_rules(self, self.model) if self.resume is None else ()),
            self.lacks_validation(self.val_dataset or self.val_ratio),
            (self.val_dataset and self.val_ratio, given(self, "val_ratio"),
             "--val-dataset is given", None),
            (self.max_steps, given(self, "num_train_epochs"), "--max-steps is given", None),
            (self.train_vision and self.vision_cache in ("disk", "memory"), "--vision-cache",
             "--train-vision changes the features in every step", None),
            (self.eval_metric is None, given(self, "eval_samples"), "--eval-metric is not given",
             None),
            (self.resume is None, given(self, "overwrite"),
             "only --resume meets checkpoints; a new run gets a folder of its own", None),
            (self.resume is None and self.adapter is None, given(self, "accept_changes"),
             "a new run has nothing that could have changed", None),
        )

    def lacks_validation(self, found: object) -> Rule:
        """The rule of settings that need validation data: they do not act where none is found."""
        flags = given(self, "early_stop", "eval_steps", "eval_metric", "eval_samples")
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
