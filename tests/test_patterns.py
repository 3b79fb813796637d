"""Expressions in an adapter's files: none takes long on a name, whatever it holds."""

from __future__ import annotations

import json
import re
import time

import pytest

from vlft.checkpoints.runs import read_adapter_config
from vlft.errors import CheckpointError
from vlft.patterns import are_quick
from vlft.training.lora import targets_pattern

NAME = "model.vision_tower.vision_encoder.encoder.layers.23.self_attn.base_layer.out_proj.lora_A"
SLOW = [
    "(a+)+x", "(a|a)*x", "(a*)*x", ".?" * 40 + "X", "(.|.)" * 30 + "X", "a*a*a*a*a*a*a*a*x",
    r"(\w+\.)+x", r"(\w\w?)*X", "(?:.?.?){30}X", "(?=(.|.)(.|.)*X).*", ".+.+.+.+X",
    "((.{0,9}){0,9}){0,9}X", "(?:(?:.*)?)*X", r"(.)(?(1).?|.?){40}X",
]  # fmt: skip
QUICK = [
    r".*self_attn.*(q_proj|k_proj)$", r"(?:.*\.)?layers\.\d+\.(q_proj)", "all-linear",
    r"^(language_model(?=\.).*\.(down_proj|gate_proj|q_proj))$", "q_proj", r".*\.\d{1,3}\..*",
    r"^(?!.*visual).*(q_proj|v_proj).*", "(q|k|v)_proj", "a{65535}", ".*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_slow_ones_are_found(pattern):
    assert not are_quick([pattern])


@pytest.mark.parametrize("pattern", QUICK)
def test_what_adapters_have_is_allowed(pattern):
    assert are_quick([pattern])


@pytest.mark.parametrize("pattern", [*QUICK, "(.|.)" * 17 + "X", ".*.*.*X", ".?" * 17 + "X"])
def test_what_is_allowed_is_quick(pattern):
    assert are_quick([pattern])
    expression = re.compile(pattern)
    begin = time.process_time()
    expression.fullmatch(NAME)
    assert time.process_time() - begin < 0.2


def test_together_they_are_bounded_too():
    assert are_quick([".*.*.*X"])
    assert not are_quick([".*.*.*X"] * 2)
    assert are_quick(["a"] * 500)
    assert not are_quick(["a"] * 501)


@pytest.mark.parametrize("pattern", ["[", "(", "*a", "(" * 2000 + ")" * 2000, r"\1"])
def test_what_is_no_expression(pattern):
    assert not are_quick([pattern])


def test_the_form_that_vlft_writes():
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
    names = [f"model.language_model.layers.{n}.mlp.{leaf}" for n in range(80) for leaf in leaves]
    assert are_quick([targets_pattern(names)])
    assert are_quick([rf"(.*\.)?({name})$" for name in names[:500]])


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"rank_pattern": {"(a+)+x": 4}}, "rank_pattern: found"),
        ({"alpha_pattern": {"q_proj": 4, ".?" * 40: 8}}, "alpha_pattern: found"),
        ({"rank_pattern": {f"m{n}": 4 for n in range(501)}}, "rank_pattern: found"),
        ({"rank_pattern": {"[": 4}}, "rank_pattern: found"),
        ({"layers_pattern": ["layers", "(a|a)*x"]}, "layers_pattern: found"),
        ({"layers_pattern": "(a|a)*x"}, "layers_pattern: found"),
        ({"exclude_modules": "(.|.)*x"}, "exclude_modules: found"),
        ({"target_modules": ["q_proj", "(a+)+"]}, "target_modules: found"),
        ({"modules_to_save": [".*"]}, "modules_to_save: found"),
        ({"target_parameters": ["a\nb"]}, "target_parameters: found"),
    ],
)
def test_files_with_others_are_refused(tmp_path, fields, place):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    with pytest.raises(CheckpointError, match=place) as error:
        read_adapter_config(tmp_path)
    assert error.value.place.endswith("adapter_config.json")


def test_plain_names_are_read(tmp_path):
    fields = {
        "peft_type": "LORA", "rank_pattern": {"layers.0.q_proj": 4}, "alpha_pattern": {"^q": 8},
        "layers_pattern": ["layers", "blocks"], "modules_to_save": ["lm_head", "model.aligner"],
        "target_modules": ["q_proj", "layers.1.self_attn.k_proj"],
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert read_adapter_config(tmp_path) == fields
