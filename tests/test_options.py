"""The words of a command line: the spellings that are understood, and what is said of others."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from vlft.cli import app, ms_swift
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings
from vlft.errors import UsageError
from vlft.settings import field_type, flag


def read(line: str) -> Any:
    """The settings of a command line, ``vlft`` left out."""
    command, *words = shlex.split(line)
    return read_settings(COMMANDS[command].config, command, words)[0]


def message(line: str) -> str:
    with pytest.raises(UsageError) as error:
        read(line)
    assert error.value.exit_code == 2
    return str(error.value)


def settings(line: str) -> dict[str, Any]:
    """The settings that a command line changes."""
    command, *words = shlex.split(line)
    config, given = read_settings(COMMANDS[command].config, command, words)
    return {name: getattr(config, name) for name in given}


class TestSpelling:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("--lora_target_modules ALL", {"lora_target_modules": "ALL"}),
            ("--lora_rank=4", {"lora_rank": 4}),
            ("--lora-alpha 8", {"lora_alpha": 8.0}),
            ("--val_dataset v.jsonl", {"val_dataset": ("v.jsonl",)}),
            ("--val_dataset=v.jsonl --val-dataset w", {"val_dataset": ("v.jsonl", "w")}),
            ("--image-root=--x", {"image_root": Path("--x")}),
            ("--tokens_per_microbatch auto", {"tokens_per_microbatch": None}),
            ("--no_share_prefix", {"share_prefix": False}),
            ("--seed +7", {"seed": 7}),
            ("--lora-rank 4 --lora-rank 2", {"lora_rank": 2}),
            ("--learning_rate 1e-4 --max_steps=3", {"learning_rate": 1e-4, "max_steps": 3}),
        ],
    )
    def test_of_flags(self, line, expected):
        assert settings(f"sft --dataset a {line}") == {"dataset": ("a",), **expected}

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("--dataset a b#5 c", ("a", "b#5", "c")),
            ("--dataset a b --seed 1 --dataset c", ("a", "b", "c")),
            ("--dataset=a b", ("a", "b")),
        ],
    )
    def test_of_lists(self, line, expected):
        assert read(f"sft {line}").dataset == expected

    @pytest.mark.parametrize(
        "line",
        [
            "SRC DST --overwrite",
            "--overwrite SRC DST",
            "SRC --overwrite true DST --format original",
        ],
    )
    def test_of_arguments(self, line):
        config = read(f"convert {line}")
        assert (config.src, config.dst, config.overwrite) == ("SRC", Path("DST"), True)

    def test_a_hyphen_alone_makes_no_flag(self):
        assert read("infer --ckpt-dir x --system '--- be brief'").system == "--- be brief"
        assert read("infer --ckpt-dir x --dataset a --output -1").output == Path("-1")

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("--lora-rank", "--lora-rank: found nothing, a value is needed"),
            ("--dataset --seed 1", "--dataset: found nothing, a value is needed"),
            ("--lora_rank x", "--lora-rank: found 'x', a whole number is allowed"),
            ("--lora-rank 4.0", "--lora-rank: found '4.0', a whole number is allowed"),
            ("--tuner x", "--tuner: found 'x'\n hint: allowed: lora, full"),
            (
                "--target_modules q_proj k_proj",
                "--target_modules: found 2 values, one is allowed\n"
                " hint: put quotes around a value with spaces, commas between several names",
            ),
            ("a.jsonl", "vlft sft: found 'a.jsonl' without a flag\n hint: vlft sft --help lists "),
            (
                "--lora_rnk 8",
                "vlft sft: unknown flag '--lora_rnk'\n hint: did you mean --lora-rank?",
            ),
            ("--zzz", "vlft sft: unknown flag '--zzz'\n hint: vlft sft --help lists the flags"),
        ],
    )
    def test_what_is_not_understood(self, line, found):
        assert message(f"sft {line}").startswith(found)

    def test_too_many_arguments(self):
        assert message("convert a b c d").startswith("vlft convert: found 'c' without a flag\n")
        assert "found 'd'" in message("convert a b c d")


class TestBooleans:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--merge_lora true", True),
            ("--merge-lora True", True),
            ("--merge_lora=true", True),
            ("--merge-lora", True),
            ("--merge-lora --seed 1", True),
            ("--merge_lora false", False),
            ("--merge-lora=FALSE", False),
            ("--no-merge-lora", False),
            ("--no_merge_lora --seed 1", False),
            ("--merge-lora --no-merge-lora", False),
        ],
    )
    def test_all_their_spellings(self, words, expected):
        assert read(f"infer --ckpt-dir x {words}").merge_lora is expected

    @pytest.mark.parametrize("words", ["--merge_lora maybe", "--merge_lora=maybe"])
    def test_another_word(self, words):
        expected = "--merge_lora: found 'maybe', true or false is allowed"
        assert message(f"infer --ckpt-dir x {words}") == expected

    @pytest.mark.parametrize("words", ["--no-merge-lora true", "--no-merge-lora=false"])
    def test_a_double_negation(self, words):
        assert ", no value is allowed" in message(f"infer --ckpt-dir x {words}")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_flag_of_yes_or_no(self, command):
        cls = COMMANDS[command].config
        needed = {
            "infer": "--ckpt-dir x --dataset a ",
            "eval": "--ckpt-dir x --dataset a ",
            "convert": "a b ",
            "merge-lora": "--ckpt-dir x ",
            "data": "a --output b.jsonl ",
            "draw": "--ckpt-dir x --dataset a ",
            "serve": "--ckpt-dir x ",
            "app": "--ckpt-dir x ",
            "push": "a b/c ",
        }
        needed |= {"sft": "--dataset a ", "check": "a --write b.jsonl "}
        for spec in dataclasses.fields(cls):
            if field_type(cls, spec.name) is bool:
                line = f"{command} {needed.get(command, '')}{flag(spec.name)}"
                if spec.name != "load_dataset_config":
                    assert getattr(read(f"{line} true"), spec.name) is True
                assert getattr(read(f"{line} false"), spec.name) is False

    def test_the_exit_code(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["vlft", "merge-lora", "--overwrite", "maybe"])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert stop.value.code == 2
        assert capsys.readouterr().err == (
            "error: --overwrite: found 'maybe', true or false is allowed\n"
        )


# From ms-swift's pages on these models, 2.x and 3.x, and from what its users publish.
COMMANDS_OF_TUTORIALS = [
    (
        "sft --model_id_or_path m --dataset a.json --sft_type lora --lora_target_modules ALL "
        "--dtype bf16 --output_dir out --num_train_epochs 5 --max_length 2048",
        {"model": "m", "dataset": ("a.json",), "tuner": "lora", "lora_target_modules": "ALL",
         "dtype": "bfloat16", "output_dir": Path("out"), "num_train_epochs": 5, "max_length": 2048},
    ),
    (
        "sft --model m --train_type lora --dataset 'a#500' 'b#500' --torch_dtype bfloat16 "
        "--num_train_epochs 1 --learning_rate 1e-4 --lora_rank 8 --lora_alpha 32 "
        "--target_modules all-linear --eval_steps 50 --save_steps 50 --save_total_limit 2 "
        "--logging_steps 5 --warmup_ratio 0.05 --gradient_checkpointing true "
        "--attn_impl sdpa --split_dataset_ratio 0.01",
        {"model": "m", "tuner": "lora", "dataset": ("a#500", "b#500"), "dtype": "bfloat16",
         "num_train_epochs": 1, "learning_rate": 1e-4, "lora_rank": 8, "lora_alpha": 32.0,
         "lora_target_modules": "ALL", "eval_steps": 50, "save_steps": 50, "save_total_limit": 2,
         "logging_steps": 5, "warmup_ratio": 0.05, "gradient_checkpointing": True, "attn": "sdpa",
         "val_ratio": 0.01},
    ),
    (
        "sft --custom_train_dataset_path a --custom_val_dataset_path b --tuner_type lora "
        "--lr_scheduler_type linear --lora_dropout_p 0.1 --resume_from_checkpoint c "
        "--init_weights pissa --target_modules DEFAULT --model a/m --model_revision master "
        "--dataset_test_ratio 0.1",
        {"dataset": ("a",), "val_dataset": ("b",), "tuner": "lora", "lr_scheduler": "linear",
         "model": "a/m",
         "lora_dropout": 0.1, "resume": Path("c"), "init_lora_weights": "pissa",
         "lora_target_modules": "qkv", "revision": "master", "val_ratio": 0.1},
    ),
    (
        "infer --ckpt_dir output/m/v0/checkpoint-9 --load_dataset_config true",
        {"ckpt_dir": (Path("output/m/v0/checkpoint-9"),), "load_dataset_config": True},
    ),
    (
        "infer --adapters c --load_data_args true --max_new_tokens 64 --merge_lora true",
        {"ckpt_dir": (Path("c"),), "load_dataset_config": True, "max_new_tokens": 64,
         "merge_lora": True},
    ),
    ("infer --model m --val_dataset v", {"model": "m", "dataset": ("v",)}),
    ("infer --ckpt_dir c --custom_val_dataset_path v --result_path r.jsonl",
     {"ckpt_dir": (Path("c"),), "dataset": ("v",), "output": Path("r.jsonl")}),
    ("merge-lora --ckpt_dir c", {"ckpt_dir": Path("c")}),
]  # fmt: skip


class TestMsSwift:
    @pytest.mark.parametrize(("line", "expected"), COMMANDS_OF_TUTORIALS)
    def test_commands_of_tutorials(self, line, expected):
        assert settings(line) == expected

    @pytest.mark.parametrize(("line", "expected"), COMMANDS_OF_TUTORIALS)
    def test_as_a_file(self, line, expected, tmp_path):
        """The same names are keys of a file."""
        command, *words = shlex.split(line)
        text = ""
        for word in words:
            text += f"\n{word}:" if word.startswith("--") else f"\n- '{word}'"
        # A list of one is that one.
        text = re.sub(r":\n- '(.*)'(?=\n--|$)", r": \1", text)
        file = tmp_path / "c.yaml"
        file.write_text(text)
        # A file does not resume a run, see test_combinations.py.
        of_a_run = {name: value for name, value in expected.items() if name != "resume"}
        assert settings(f"{command} --config {file}") == of_a_run

    def test_what_to_write_instead_is_said_of_all_at_once(self):
        line = (
            "sft --model_type deepseek-vl-7b-chat --dataset a --sft_type full "
            "--use_flash_attn true --deepspeed default-zero2 --use-dora maybe --lora_rank x"
        )
        assert message(line) == (
            "vlft sft: unknown flag '--model_type'\n"
            " hint: leave it out, the checkpoint says it; --model names the folder or hub id\n"
            "vlft sft: unknown flag '--use_flash_attn'\n"
            " hint: leave it out; --attn chooses the attention implementation\n"
            "vlft sft: unknown flag '--deepspeed'\n"
            " hint: leave it out and start with accelerate launch --config_file "
            "docs/accelerate/zero2.yaml -m vlft sft ...\n"
            "--use-dora: found 'maybe', true or false is allowed\n"
            "--lora-rank: found 'x', a whole number is allowed"
        )

    def test_and_of_a_file(self, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text("deepspeed: zero2\nquant_bits: 4\nmodel: a\nmodel-id-or-path: b\n")
        assert message(f"sft --config {file} --dataset a --freeze_vit false") == (
            f"{file}: deepspeed: unknown setting 'deepspeed'\n"
            f" hint: {ms_swift.INSTEAD['deepspeed']}\n"
            f"{file}: quant_bits: unknown setting 'quant_bits'\n"
            " hint: write --quantize nf4 for 4 bit, --quantize int8 for 8 bit\n"
            f"{file}: model_id_or_path: the same setting as 'model', given twice\n"
            "vlft sft: unknown flag '--freeze_vit'\n"
            " hint: write --train-vision for --freeze_vit false; the towers are frozen by default"
        )

    def test_each_hint_names_what_exists(self):
        flags = {
            flag(spec.name)
            for item in COMMANDS.values()
            for spec in dataclasses.fields(item.config)
        }
        for name, hint in ms_swift.INSTEAD.items():
            for word in hint.replace(",", " ").replace(";", " ").replace(":", " ").split():
                if word.startswith("--") and word not in ("--config_file", f"--{name}"):
                    assert word in flags, (name, word)
        for name, others in ms_swift.ALIASES.items():
            assert flag(name) in flags
            # vlft sft does not begin with another adapter.
            assert ms_swift.INSTEAD.keys() & set(others.split()) <= {"adapters"}
        for name in ms_swift.SYNONYMS:
            assert flag(name) in flags

    def test_each_alias_is_tried_above(self):
        typed = {word for line, _ in COMMANDS_OF_TUTORIALS for word in line.split()}
        others = " ".join(ms_swift.ALIASES.values()).split()
        assert {f"--{alias}" for alias in others} <= typed

    @pytest.mark.parametrize(
        ("typed", "hint"),
        [
            ("export", "vlft merge-lora writes a merged model, vlft convert another layout"),
            ("sfft", "did you mean 'sft'?"),
            ("--lora-rank", f"allowed: {', '.join(COMMANDS)}"),
        ],
    )
    def test_an_unknown_command(self, monkeypatch, capsys, typed, hint):
        monkeypatch.setattr(sys, "argv", ["vlft", typed, "8"])
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert stop.value.code == 2
        assert capsys.readouterr().err == (
            f"error: vlft: unknown command {typed!r}\n hint: {hint}\n"
        )

    def test_a_command_with_an_underscore(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["vlft", "merge_lora"])
        with pytest.raises(SystemExit):
            app.main()
        assert capsys.readouterr().err.startswith("error: --ckpt-dir: no adapter given")
