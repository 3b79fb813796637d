"""The flags of ms-swift, whose commands this field's tutorials print, and what they are here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

# A setting -> its other names, for the commands that have it.
ALIASES = {
    "adapter": "adapters",
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

# The flags that no setting here is the exact counterpart of -> what to write instead.
_INSTEAD = {
    "model_type template template_type":
        "leave it out, the checkpoint says it; --model names the folder or hub id",
    "local_repo_path": "leave it out: no code of the model's authors is needed",
    "use_hf": "write --hub huggingface or --hub modelscope",
    "device_map": "write --device cpu or --device cuda",
    "bf16 fp16": "write --dtype bfloat16 or --dtype float16",
    "use_flash_attn": "leave it out; --attn chooses the attention implementation",
    "quant_bits quant_method quantization_bit":
        "write --quantize nf4 for 4 bit, --quantize int8 for 8 bit",
    "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant":
        "leave it out: --quantize nf4 is doubly quantised NF4 and computes in --dtype",
    "show_dataset_sample train_dataset_sample val_dataset_sample":
        "write the number of records after the file: --dataset FILE#N",
    "push_to_hub hub_model_id hub_private_repo":
        "write vlft push RUN OWNER/NAME once the run is finished",
    "truncation_strategy": "write --on-long skip, or truncate-history to drop old turns",
    "group_by_length lazy_tokenize packing padding_free streaming":
        "leave it out: rows are always packed without padding, and records read when needed",
    "interleave_prob interleave_probs": "write --mix 0.7,0.3, a number for each --dataset in order",
    "dataloader_num_workers dataset_num_proc load_from_cache_file":
        "leave it out: images are encoded once, before training",
    "system": 'write "system" into the records',
    "tuner_backend": "leave it out: the adapter is peft's",
    "freeze_llm": "leave it out: the LLM is always tuned",
    "freeze_vit":
        "write --train-vision for --freeze_vit false; the towers are frozen by default",
    "freeze_aligner": "write --train-aligner for --freeze_aligner false; frozen is the default",
    "aligner_lr vit_lr": "leave it out: all parts have the one --learning-rate",
    "vit_gradient_checkpointing": "leave it out: --gradient-checkpointing is for all parts",
    "gradient_accumulation_steps per_device_train_batch_size":
        "write --batch-size, the samples of an optimiser step: those per device x accumulation "
        "steps x GPUs; --tokens-per-microbatch bounds the memory",
    "eval_batch_size per_device_eval_batch_size":
        "leave it out: --tokens-per-microbatch bounds the memory",
    "warmup_steps": "write --warmup-ratio, the share of the steps",
    "adam_beta1 adam_beta2 optim": "leave it out: the optimiser is AdamW with torch's betas",
    "eval_strategy evaluation_strategy save_strategy":
        "write --save-steps and --eval-steps; without them both are done after each epoch",
    "metric_for_best_model greater_is_better load_best_model_at_end predict_with_generate":
        "write --eval-metric, a metric of vlft eval; best in the run names the best checkpoint",
    "resume_only_model ignore_data_skip":
        "write --adapter RUN for a new run that begins with its weights alone",
    "add_version logging_dir save_only_model":
        "leave it out: --output-dir gets all that a run writes",
    "deepspeed": "leave it out and start with accelerate launch --config_file "
                 "docs/accelerate/zero2.yaml -m vlft sft ...",
    "ddp_backend ddp_find_unused_parameters fsdp":
        "leave it out and start with accelerate launch, see docs/scale.md",
    "merge_lora": "use vlft merge-lora, which always merges",
    "exist_ok": "write --overwrite",
    "max_batch_size": "write --batch-size",
    "infer_backend": "leave it out: vLLM reads what vlft merge-lora writes",
    "stream": "leave it out: a chat always streams",
    "eval_human": "leave out --dataset to chat",
    "do_sample": "write --temperature: 0 is greedy, above 0 samples",
    "result_dir": "write --output FILE.jsonl",
}  # fmt: skip
INSTEAD = {name: hint for names, hint in _INSTEAD.items() for name in names.split()}


def aliases(own: Collection[str]) -> dict[str, str]:
    """Other name -> setting, for a command that has the settings ``own``."""
    here = {name: others.split() for name, others in ALIASES.items() if name in own}
    return {other: name for name, others in here.items() for other in others if other not in own}
