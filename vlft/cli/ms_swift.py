"""The flags of ms-swift, whose commands this field's tutorials print, and what they are here."""

from __future__ import annotations

# Another name of the same setting, for the commands that have it under our name.
ALIASES = {
    "adapters": "ckpt_dir",
    "attn_impl": "attn",
    "custom_train_dataset_path": "dataset",
    "custom_val_dataset_path": "val_dataset",
    "dataset_test_ratio": "val_ratio",
    "init_weights": "init_lora_weights",
    "load_data_args": "load_dataset_config",
    "lora_dropout_p": "lora_dropout",
    "lr_scheduler_type": "lr_scheduler",
    "model_id_or_path": "model",
    "model_revision": "revision",
    "result_path": "output",
    "resume_from_checkpoint": "resume",
    "sft_type": "tuner",
    "split_dataset_ratio": "val_ratio",
    "target_modules": "lora_target_modules",
    "torch_dtype": "dtype",
    "train_type": "tuner",
    "tuner_type": "tuner",
    # vlft infer answers one data set, whichever part of the data it is.
    "val_dataset": "dataset",
}

# Another word for the same value of a setting.
SYNONYMS = {
    "dtype": {"AUTO": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
    "lora_target_modules": {"DEFAULT": "qkv", "all-linear": "ALL"},
}

_BATCH = (
    "write --batch-size, the samples of an optimiser step: those per device x accumulation steps "
    "x GPUs; --tokens-per-microbatch bounds the memory"
)
_SAMPLE = "write the number of records after the file: --dataset FILE#N"
_QUANTIZE = "write --quantize nf4 for 4 bit, --quantize int8 for 8 bit"
_CHECKPOINT = "leave it out, the checkpoint says it; --model names the folder or hub id"
_LAUNCH = "leave it out and start with accelerate launch, see docs/scale.md"
_STEPS = "write --save-steps and --eval-steps; without them both are done after each epoch"
_ROWS = "leave it out: rows are always packed without padding, and records read when needed"
_LOADING = "leave it out: images are encoded once, before training"
_RUN_FOLDER = "leave it out: --output-dir gets all that a run writes"
_OPTIMIZER = "leave it out: the optimiser is AdamW with torch's betas"

# Without a counterpart of exactly the same meaning: what to write instead.
INSTEAD = {
    "model_type": _CHECKPOINT,
    "template": _CHECKPOINT,
    "template_type": _CHECKPOINT,
    "local_repo_path": "leave it out: no code of the model's authors is needed",
    "use_hf": "write --hub huggingface or --hub modelscope",
    "device_map": "write --device cpu or --device cuda",
    "bf16": "write --dtype bfloat16",
    "fp16": "write --dtype float16",
    "use_flash_attn": "leave it out; --attn chooses the attention implementation",
    "quant_bits": _QUANTIZE,
    "quant_method": _QUANTIZE,
    "quantization_bit": _QUANTIZE,
    "bnb_4bit_quant_type": "write --quantize nf4",
    "bnb_4bit_use_double_quant": "leave it out: --quantize nf4 is doubly quantised",
    "bnb_4bit_compute_dtype": "leave it out: --quantize nf4 computes in --dtype",
    "train_dataset_sample": _SAMPLE,
    "val_dataset_sample": _SAMPLE,
    "show_dataset_sample": _SAMPLE,
    "truncation_strategy": "write --on-long skip, or truncate-history to drop old turns",
    "packing": _ROWS,
    "padding_free": _ROWS,
    "lazy_tokenize": _ROWS,
    "streaming": _ROWS,
    "group_by_length": _ROWS,
    "dataset_num_proc": _LOADING,
    "dataloader_num_workers": _LOADING,
    "load_from_cache_file": _LOADING,
    "system": 'write "system" into the records',
    "tuner_backend": "leave it out: the adapter is peft's",
    "freeze_vit": "write --train-vision for --freeze_vit false; the towers are frozen by default",
    "freeze_aligner": "write --train-aligner for --freeze_aligner false; frozen is the default",
    "freeze_llm": "leave it out: the LLM is always tuned",
    "vit_lr": "leave it out: --learning-rate is that of all parts",
    "aligner_lr": "leave it out: --learning-rate is that of all parts",
    "adapters": "write --resume with a run or checkpoint folder to continue its training",
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "per_device_eval_batch_size": "leave it out: --tokens-per-microbatch bounds the memory",
    "max_batch_size": "write --batch-size",
    "eval_batch_size": "leave it out: --tokens-per-microbatch bounds the memory",
    "vit_gradient_checkpointing": "leave it out: --gradient-checkpointing is for all parts",
    "warmup_steps": "write --warmup-ratio, the share of the steps",
    "optim": _OPTIMIZER,
    "adam_beta1": _OPTIMIZER,
    "adam_beta2": _OPTIMIZER,
    "save_strategy": _STEPS,
    "eval_strategy": _STEPS,
    "evaluation_strategy": _STEPS,
    "save_only_model": _RUN_FOLDER,
    "logging_dir": _RUN_FOLDER,
    "add_version": _RUN_FOLDER,
    "deepspeed": (
        "leave it out and start with accelerate launch "
        "--config_file docs/accelerate/zero2.yaml -m vlft sft ..."
    ),
    "fsdp": _LAUNCH,
    "ddp_backend": _LAUNCH,
    "ddp_find_unused_parameters": _LAUNCH,
    "merge_lora": "use vlft merge-lora, which always merges",
    "infer_backend": "leave it out: vLLM reads what vlft merge-lora writes",
    "stream": "leave it out: a chat always streams",
    "eval_human": "leave out --dataset to chat",
    "do_sample": "write --temperature: 0 is greedy, above 0 samples",
    "exist_ok": "write --overwrite",
    "result_dir": "write --output FILE.jsonl",
}
