"""Every setting, once: its name, default, help and limits.

The flags of the command line, the keys of ``--config FILE``, the saved ``run_config.json`` and the
Python API are all made from these dataclasses.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from vlft.errors import ConfigError, UsageError
from vlft.settings import Settings, flag, setting

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZE = ("none", "nf4", "int8")
ATTENTION = ("auto", "sdpa", "eager")
HUBS = ("huggingface", "modelscope")
INIT_LORA = ("default", "gaussian", "orthogonal", "olora", "pissa")

# Tokens of a row that keep a step busy; on a GPU until what fits has been found out.
TOKENS_PER_ROW = {"cpu": 4096, "cuda": 8192}
# Samples that share little are joined in a row up to so many tokens: enough to fill the matrix
# products of a CPU, where longer rows would only take more memory; on a GPU all that fits.
JOINED_TOKENS = {"cpu": 1024, "cuda": sys.maxsize}

# Memory in GiB of a GPU, by its name without the maker and the series.
GPUS = {
    "t4": 15, "l4": 22.5, "a10": 22.5, "a10g": 22.5, "v100": 32, "3090": 24, "4090": 24, "5090": 32,
    "a6000": 48, "l40s": 45, "a100": 80, "h100": 80, "h200": 140, "b200": 180,
}  # fmt: skip
# A number above this is a mistyped name, not a size in GiB.
LARGEST_GPU = 256

# These set base weights too, which 4 and 8 bit cannot hold.
CHANGES_BASE = ("orthogonal", "olora", "pissa")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Settings of ``vlft sft``."""

    model: str | None = setting(
        None,
        "Model folder or hub id.",
        panel="Model",
        shown="the tiny model in sample_data",
    )
    revision: str | None = setting(None, "Branch, tag or commit on the hub.", panel="Model")
    hub: str = setting("huggingface", "Where a model id is looked up.", panel="Model", choices=HUBS)
    dtype: str = setting(
        "auto",
        "Number format of the weights. auto: float32 on the CPU, the checkpoint's on a GPU.",
        panel="Model",
        choices=DTYPES,
    )
    device: str = setting("auto", "Where to run.", panel="Model", choices=DEVICES)
    quantize: str = setting(
        "none", "Store the frozen LLM in 4 or 8 bit (QLoRA).", panel="Model", choices=QUANTIZE
    )
    attn: str = setting(
        "auto",
        "Attention implementation; flex needs a GPU. auto: sdpa, by trees.",
        panel="Model",
        choices=(*ATTENTION, "flex"),
    )

    dataset: tuple[str, ...] = setting(
        (),
        "Training data: .jsonl, .json or .csv. FILE#N takes N records. Repeatable.",
        panel="Data",
        shown="required",
    )
    val_dataset: tuple[str, ...] = setting((), "Validation data. Repeatable.", panel="Data")
    val_ratio: float = setting(
        0.05,
        "Share split off for validation when no validation data is given.",
        panel="Data",
        minimum=0,
        maximum=0.9,
    )
    image_root: Path | None = setting(
        None, "Folder that image paths start from.", panel="Data", shown="the data file's folder"
    )
    max_length: int | None = setting(
        None, "Longest sample, in tokens.", panel="Data", minimum=8, shown="the model's"
    )
    on_long: str = setting(
        "error",
        "What to do with a longer sample.",
        panel="Data",
        choices=("error", "skip", "truncate-history"),
    )
    on_bad_sample: str = setting(
        "error", "What to do with a bad record.", panel="Data", choices=("error", "skip")
    )

    tuner: str = setting("lora", "What is trained.", panel="Tuning", choices=("lora", "full"))
    lora_target_modules: str = setting(
        "qkv",
        "qkv, ALL, module names with commas between, or a regular expression.",
        panel="Tuning",
    )
    lora_rank: int = setting(8, "Rank of the update.", panel="Tuning", minimum=1)
    lora_alpha: float = setting(32.0, "Scale of the update, times 1/rank.", panel="Tuning", above=0)
    lora_dropout: float = setting(
        0.0, "Dropout before the update.", panel="Tuning", minimum=0, maximum=0.95
    )
    use_dora: bool = setting(False, "Train magnitude and direction apart.", panel="Tuning")
    use_rslora: bool = setting(False, "Scale by 1/sqrt(rank).", panel="Tuning")
    init_lora_weights: str = setting(
        "default", "How the update starts.", panel="Tuning", choices=INIT_LORA
    )
    train_aligner: bool = setting(False, "Train the aligner too.", panel="Tuning")
    train_vision: bool = setting(False, "Train the vision tower too.", panel="Tuning")

    num_train_epochs: int = setting(
        3, "Passes over the training data.", panel="Optimisation", minimum=1
    )
    max_steps: int | None = setting(
        None, "Stop after this many steps.", panel="Optimisation", minimum=1, shown="by epochs"
    )
    batch_size: int = setting(16, "Samples per optimiser step.", panel="Optimisation", minimum=1)
    tokens_per_microbatch: int | None = setting(
        None,
        "Most tokens in one packed row; bounds memory, changes no result.",
        panel="Optimisation",
        minimum=1,
        shown="auto: 4096, on a GPU what fits",
        auto=True,
    )
    learning_rate: float | None = setting(
        None, "Peak learning rate.", panel="Optimisation", above=0, shown="1e-4; 1e-5 for full"
    )
    lr_scheduler: str = setting(
        "cosine",
        "Shape after the warm-up.",
        panel="Optimisation",
        choices=("cosine", "linear", "constant"),
    )
    warmup_ratio: float = setting(
        0.05, "Share of the steps that warms up.", panel="Optimisation", minimum=0, maximum=1
    )
    weight_decay: float = setting(0.1, "Of AdamW.", panel="Optimisation", minimum=0)
    max_grad_norm: float = setting(
        1.0, "Clip gradients to this norm; 0 does not.", panel="Optimisation", minimum=0
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Recompute activations to save memory.",
        panel="Optimisation",
        shown="auto: if rows do not fit into a GPU without",
        resumable=True,
    )
    share_prefix: bool = setting(
        True, "Run each shared prompt prefix once per row.", panel="Optimisation"
    )
    vision_cache: str = setting(
        "auto",
        "Where the features of images are kept while the tower is frozen.",
        panel="Optimisation",
        choices=("auto", "disk", "memory", "off"),
        resumable=True,
    )
    seed: int = setting(42, "Of sampling, order and new weights.", panel="Optimisation", minimum=0)

    output_dir: Path = setting(Path("output"), "Where runs are written.", panel="Run")
    save_steps: int | None = setting(
        None,
        "Steps between checkpoints.",
        panel="Run",
        minimum=1,
        shown="each epoch",
    )
    eval_steps: int | None = setting(
        None, "Steps between evaluations.", panel="Run", minimum=1, shown="as save-steps"
    )
    save_total_limit: int | None = setting(
        3, "Checkpoints kept; best and last always are.", panel="Run", minimum=1, resumable=True
    )
    logging_steps: int = setting(
        1, "Steps between log lines.", panel="Run", minimum=1, resumable=True
    )
    early_stop: int | None = setting(
        None,
        "Stop after this many evaluations without a better loss.",
        panel="Run",
        minimum=1,
        shown="never",
    )
    report_to: str = setting(
        "none",
        "Tracker to report to as well.",
        panel="Run",
        choices=("none", "tensorboard", "wandb"),
        resumable=True,
    )
    resume: Path | None = setting(
        None, "Run or checkpoint folder to continue.", panel="Run", resumable=True
    )
    overwrite: bool = setting(
        False,
        "With --resume: remove the run's checkpoints after the resumed one.",
        panel="Run",
        resumable=True,
    )
    show_sample: bool = setting(
        True, "Print one encoded sample first.", panel="Run", resumable=True
    )

    def problems(self) -> list[UsageError]:
        """All that is wrong between settings; each alone is checked by ``check``."""
        found: list[UsageError] = []
        if not self.dataset and self.resume is None:
            found.append(
                ConfigError(
                    "no training data given",
                    place="--dataset",
                    hint="name a .jsonl, .json or .csv file, e.g. --dataset train.jsonl",
                )
            )
        if self.tuner == "full":
            if self.quantize != "none":
                found.append(
                    ConfigError(
                        f"found {self.quantize} with --tuner full; quantised weights cannot train",
                        place="--quantize",
                        hint="use --tuner lora, or --quantize none",
                    )
                )
            for name in ("use_dora", "use_rslora"):
                if getattr(self, name):
                    found.append(
                        ConfigError("belongs to --tuner lora, found full", place=flag(name))
                    )
        if self.init_lora_weights == "orthogonal" and self.lora_rank % 2:
            found.append(
                ConfigError(
                    f"found {self.lora_rank} with --init-lora-weights orthogonal; it takes an "
                    "even rank",
                    place="--lora-rank",
                )
            )
        if self.init_lora_weights in CHANGES_BASE and self.quantize != "none":
            found.append(
                ConfigError(
                    f"{self.init_lora_weights} changes the base weights, which {self.quantize} "
                    "cannot hold",
                    place="--init-lora-weights",
                    hint="use default or gaussian with --quantize",
                )
            )
        return found


@dataclass(frozen=True, kw_only=True)
class PlanConfig(SftConfig):
    """Settings of ``vlft plan``: those of the run that is planned, and the GPU."""

    gpu: str = setting("24GB", "GPU to plan for: its memory, or a name like a100.", panel="Plan")

    def problems(self) -> list[UsageError]:
        """Those of the run, except missing data: memory is planned without; and the GPU's."""
        found = [problem for problem in super().problems() if problem.place != "--dataset"]
        try:
            gpu_gib(self.gpu)
        except ConfigError as error:
            found.append(error)
        return found


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Settings of ``vlft infer``."""

    ckpt_dir: Path | None = setting(
        None, "A run or a checkpoint-N folder of vlft sft.", panel="Model"
    )
    model: str | None = setting(
        None, "Base model, or a model without adapter.", panel="Model", shown="the checkpoint's"
    )
    revision: str | None = setting(None, "Branch, tag or commit on the hub.", panel="Model")
    hub: str = setting("huggingface", "Where a model id is looked up.", panel="Model", choices=HUBS)
    dtype: str = setting(
        "auto", "Number format. auto: as in training.", panel="Model", choices=DTYPES
    )
    device: str = setting("auto", "Where to run.", panel="Model", choices=DEVICES)
    quantize: str | None = setting(
        None,
        "Store the LLM in 4 or 8 bit.",
        panel="Model",
        choices=QUANTIZE,
        shown="as in training",
    )
    attn: str = setting("auto", "Attention implementation.", panel="Model", choices=ATTENTION)
    merge_lora: bool = setting(False, "Merge the adapter in memory first.", panel="Model")

    load_dataset_config: bool = setting(
        False, "Answer the validation set of the run.", panel="Data"
    )
    dataset: tuple[str, ...] = setting((), "Answer the records of these files.", panel="Data")
    image_root: Path | None = setting(
        None, "Folder that image paths start from.", panel="Data", shown="the data file's folder"
    )
    on_bad_sample: str = setting(
        "error", "What to do with a bad record.", panel="Data", choices=("error", "skip")
    )
    system: str | None = setting(
        None, "System prompt of a chat; empty for none.", panel="Data", shown="the family's"
    )

    max_new_tokens: int = setting(512, "Longest reply, in tokens.", panel="Generation", minimum=1)
    temperature: float = setting(
        0.0, "0 is greedy; above, sampling.", panel="Generation", minimum=0
    )
    top_p: float = setting(1.0, "Nucleus sampling.", panel="Generation", above=0, maximum=1)
    top_k: int = setting(0, "Sample from the k best; 0: all.", panel="Generation", minimum=0)
    repetition_penalty: float = setting(
        1.0, "Above 1 discourages repeats.", panel="Generation", above=0
    )
    batch_size: int = setting(8, "Records answered at once.", panel="Generation", minimum=1)
    seed: int = setting(42, "Of sampling.", panel="Generation", minimum=0)

    output: Path | None = setting(
        None, "Result file (.jsonl).", panel="Run", shown="beside the checkpoint"
    )
    overwrite: bool = setting(
        False, "Start the result file anew instead of continuing it.", panel="Run"
    )
    show_samples: int = setting(3, "Answers printed in full.", panel="Run", minimum=0)

    def problems(self) -> list[UsageError]:
        """All that is wrong between settings; each alone is checked by ``check``."""
        found: list[UsageError] = []
        if self.load_dataset_config and self.dataset:
            found.append(
                ConfigError(
                    "found together with --dataset; one of the two is allowed",
                    place="--load-dataset-config",
                    hint="leave one of them out",
                )
            )
        if self.load_dataset_config and self.ckpt_dir is None:
            found.append(
                ConfigError(
                    "needs the run whose validation set it answers",
                    place="--load-dataset-config",
                    hint="add --ckpt-dir output/.../checkpoint-N",
                )
            )
        if self.merge_lora and self.quantize not in (None, "none"):
            found.append(
                ConfigError(
                    f"found {self.quantize} with --merge-lora, which merges into whole weights",
                    place="--quantize",
                    hint="leave one of them out",
                )
            )
        if self.system is not None and (self.dataset or self.load_dataset_config):
            found.append(
                ConfigError(
                    "is of a chat; records have their own",
                    place="--system",
                    hint='write "system" into the records',
                )
            )
        if self.merge_lora and self.ckpt_dir is None:
            found.append(
                ConfigError("needs an adapter", place="--merge-lora", hint="add --ckpt-dir")
            )
        return found


@dataclass(frozen=True, kw_only=True)
class MergeLoraConfig:
    """Settings of ``vlft merge-lora``."""

    ckpt_dir: Path | None = setting(
        None, "A run or a checkpoint-N folder of vlft sft.", panel="Model", shown="required"
    )
    model: str | None = setting(None, "Base model.", panel="Model", shown="the run's")
    revision: str | None = setting(None, "Branch, tag or commit on the hub.", panel="Model")
    hub: str = setting("huggingface", "Where a model id is looked up.", panel="Model", choices=HUBS)
    base: str = setting(
        "dequantized",
        "Weights that a QLoRA adapter is added to: those trained against, or the original ones.",
        panel="Model",
        choices=("dequantized", "original"),
    )
    device: str = setting("cpu", "Where to compute, in float32.", panel="Model", choices=DEVICES)

    output_dir: Path | None = setting(
        None, "New folder of the merged model.", panel="Output", shown="CKPT_DIR-merged"
    )
    format: str = setting(
        "auto",
        "Layout. original: the authors'. auto: as the base.",
        panel="Output",
        choices=("auto", "original", "transformers"),
    )
    dtype: str = setting(
        "auto",
        "Number format of the files. auto: the one the adapter was trained in.",
        panel="Output",
        choices=DTYPES,
    )
    max_shard_size: str = setting("5GB", "Largest weight file.", panel="Output")
    overwrite: bool = setting(False, "Replace a folder that is not empty.", panel="Output")

    def problems(self) -> list[UsageError]:
        """All that is wrong between settings; each alone is checked by ``check``."""
        if self.ckpt_dir is None:
            return [
                ConfigError(
                    "no adapter given",
                    place="--ckpt-dir",
                    hint="name a run or a checkpoint-N folder of vlft sft",
                )
            ]
        return _shard_size_problems(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of ``vlft convert``."""

    src: str | None = setting(None, "Model folder or hub id.", panel="Model", argument=True)
    dst: Path | None = setting(None, "New folder.", panel="Model", argument=True)
    revision: str | None = setting(None, "Branch, tag or commit on the hub.", panel="Model")
    hub: str = setting("huggingface", "Where a model id is looked up.", panel="Model", choices=HUBS)

    format: str = setting(
        "original",
        "Layout. original: the authors'.",
        panel="Output",
        choices=("original", "transformers"),
    )
    dtype: str = setting(
        "auto",
        "Number format of the files. auto: each tensor as it is.",
        panel="Output",
        choices=DTYPES,
    )
    max_shard_size: str = setting("5GB", "Largest weight file.", panel="Output")
    overwrite: bool = setting(False, "Replace a folder that is not empty.", panel="Output")

    def problems(self) -> list[UsageError]:
        """All that is wrong between settings; each alone is checked by ``check``."""
        if self.src is None or self.dst is None:
            return [
                ConfigError(
                    "two folders are needed",
                    place="vlft convert",
                    hint="write vlft convert SRC DST --format transformers",
                )
            ]
        return _shard_size_problems(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Settings):
    """``vlft models`` has no settings."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Settings of ``vlft cache``."""

    action: str = setting(
        "info",
        "List what is kept, or remove all of it.",
        panel="Action",
        argument=True,
        choices=("info", "clear"),
    )


def gpu_gib(gpu: str) -> float:
    """Memory of a GPU in GiB, from its size or a name like ``NVIDIA A100-SXM4-40GB``.

    Raises:
        ConfigError: neither a size nor a name in ``GPUS``.
    """
    text = gpu.lower().strip()
    sized = re.fullmatch(r"(.*[\s_-])?(\d+(?:\.\d+)?)\s*gi?b", text)
    before_size = sized[1] or "" if sized else text
    name = re.sub(r"nvidia|geforce|rtx|tesla|sxm\d?|pcie|[\s_-]", "", before_size)
    if sized:
        gib = float(sized[2]) if name in GPUS or not before_size else 0
    else:
        number = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0
        gib = GPUS.get(name, number if number <= LARGEST_GPU else 0)
    if not gib:
        names = ", ".join(GPUS)
        raise ConfigError(f"found {gpu!r}", place="--gpu", hint=f"a size like 24GB, or {names}")
    return gib


def _shard_size_problems(size: str) -> list[UsageError]:
    if re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?B", size):
        return []
    return [
        ConfigError(f"found {size!r}", place="--max-shard-size", hint="write e.g. 5GB or 500MB")
    ]
