"""The flags of ms-swift, whose commands this field's tutorials print, and what they are here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

# A setting -> its other names, for the commands that have it.
ALIASES = {
    "attn": "attn_impl",
    "ckpt_dir": "adapters",
    # vlft infer answers one data set, whichever part of the data it is.
    "dataset": "custom_train_dataset_path custom_val_dataset_path val_dataset",
    "dtype": "torch_dtype",
    "init_lora_weights": "init_weights",
    "load_dataset_config": "load_data_args",
    "lora_dropout": "lora_dropout_p",
    "lora_target_modules": "target_modules",
    "lr_scheduler": "lr_scheduler_type",
    "model": "model_id_or_path",
    "output": "result_path",
    "resume": "resume_from_checkpoint",
    "revision": "model_revision",
    "tuner": "sft_type train_type tuner_type",
    "val_dataset": "custom_val_dataset_path",
    "val_ratio": "dataset_test_ratio split_dataset_ratio",
}

# A setting -> other words for its values.
SYNONYMS = {
    "dtype": {"AUTO": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
    "lora_target_modules": {"DEFAULT": "qkv", "all-linear": "ALL"},
}

# What to write instead -> the flags that no setting here is the exact counterpart of.
_INSTEAD = {
    "leave it out, the checkpoint says it; --model names the folder or hub id": (
        "model_type template template_type"
    ),
    "leave it out: no code of the model's authors is needed": "local_repo_path",
    "write --hub huggingface or --hub modelscope": "use_hf",
    "write --device cpu or --device cuda": "device_map",
    "write --dtype bfloat16 or --dtype float16": "bf16 fp16",
    "leave it out; --attn chooses the attention implementation": "use_flash_attn",
    "write --quantize nf4 for 4 bit, --quantize int8 for 8 bit": (
        "quant_bits quant_method quantization_bit"
    ),
    "leave it out: --quantize nf4 is doubly quantised NF4 and computes in --dtype": (
        "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant"
    ),
    "write the number of records after the file: --dataset FILE#N": (
        "show_dataset_sample train_dataset_sample val_dataset_sample"
    ),
    "write --on-long skip, or truncate-history to drop old turns": "truncation_strategy",
    "leave it out: rows are always packed without padding, and records read when needed": (
        "group_by_length lazy_tokenize packing padding_free streaming"
    ),
    "leave it out: images are encoded once, before training": (
        "dataloader_num_workers dataset_num_proc load_from_cache_file"
    ),
    'write "system" into the records': "system",
    "leave it out: the adapter is peft's": "tuner_backend",
    "leave it out: the LLM is always tuned": "freeze_llm",
    "write --train-vision for --freeze_vit false; the towers are frozen by default": "freeze_vit",
    "write --train-aligner for --freeze_aligner false; frozen is the default": "freeze_aligner",
    "leave it out: all parts have the one --learning-rate": "aligner_lr vit_lr",
    "leave it out: --gradient-checkpointing is for all parts": "vit_gradient_checkpointing",
    "write --resume with a run or checkpoint folder to continue its training": "adapters",
    "write --batch-size, the samples of an optimiser step: those per device x accumulation steps "
    "x GPUs; --tokens-per-microbatch bounds the memory": (
        "gradient_accumulation_steps per_device_train_batch_size"
    ),
    "leave it out: --tokens-per-microbatch bounds the memory": (
        "eval_batch_size per_device_eval_batch_size"
    ),
    "write --warmup-ratio, the share of the steps": "warmup_steps",
    "leave it out: the optimiser is AdamW with torch's betas": "adam_beta1 adam_beta2 optim",
    "write --save-steps and --eval-steps; without them both are done after each epoch": (
        "eval_strategy evaluation_strategy save_strategy"
    ),
    "leave it out: --output-dir gets all that a run writes": (
        "add_version logging_dir save_only_model"
    ),
    "leave it out and start with accelerate launch --config_file docs/accelerate/zero2.yaml "
    "-m vlft sft ...": "deepspeed",
    "leave it out and start with accelerate launch, see docs/scale.md": (
        "ddp_backend ddp_find_unused_parameters fsdp"
    ),
    "use vlft merge-lora, which always merges": "merge_lora",
    "write --overwrite": "exist_ok",
    "write --batch-size": "max_batch_size",
    "leave it out: vLLM reads what vlft merge-lora writes": "infer_backend",
    "leave it out: a chat always streams": "stream",
    "leave out --dataset to chat": "eval_human",
    "write --temperature: 0 is greedy, above 0 samples": "do_sample",
    "write --output FILE.jsonl": "result_dir",
}
INSTEAD = {name: hint for hint, names in _INSTEAD.items() for name in names.split()}


def aliases(own: Collection[str]) -> dict[str, str]:
    """Other name -> setting, for a command that has the settings ``own``."""
    found: dict[str, str] = {}
    for name, others in ALIASES.items():
        if name in own:
            found |= {other: name for other in others.split() if other not in own}
    return found
