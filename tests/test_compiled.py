"""When layers are compiled, and that it is undone; tests/test_cuda.py compiles, on any device."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import SIGLIP

import vlft
from vlft.checkpoints.placement import Placement
from vlft.distributed import SINGLE
from vlft.models import compiled
from vlft.models.adaptations import prepare_for_training, restore
from vlft.models.compiled import compile_layers
from vlft.training import model as model_module
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.model import uses_compiler

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [SIGLIP], indirect=True, ids=str)
def test_it_is_undone_and_a_copy_has_its_own_layers(model, folder):
    add_lora(model, folder.family, LoraOptions("ALL"))
    prepare_for_training(model, folder.family.parts.language)
    compile_layers(model.get_submodule(folder.family.parts.language))
    for module in (model, copy.deepcopy(model)):
        layer = module.get_submodule(folder.family.parts.language).layers[0]
        assert vars(layer)["forward"].args[0] is layer
        # What is compiled must not be a method of one layer.
        assert not any(
            {"forward", "_cast_input_dtype"} & vars(part).keys()
            for part in layer.modules()
            if part is not layer
        )
        restore(module)
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("case", [SIGLIP], indirect=True, ids=str)
def test_replies_run_the_layers_as_they_are(model, folder, processor, monkeypatch):
    """A cache grows with each token: the compiler would make code for each length."""
    prompts = [{"query": "Hello."}, {"query": "What is it, then?"}]
    usual = vlft.generate(model, processor, prompts, max_new_tokens=6)
    prepare_for_training(model, folder.family.parts.language)
    compile_layers(model.get_submodule(folder.family.parts.language))
    called: list[int] = []
    monkeypatch.setattr(compiled, "_compiled", lambda forward, _: called.append(1) or forward)
    found = vlft.generate(model, processor, prompts, max_new_tokens=6)
    assert [reply.token_ids for reply in found] == [reply.token_ids for reply in usual]
    assert not called


def test_when_layers_are_compiled(monkeypatch):
    monkeypatch.setattr(model_module, "has_triton", lambda: True)
    config = vlft.SftConfig(dataset=("x",))
    gpu = Placement(torch.device("cuda"), torch.bfloat16)
    assert uses_compiler(config, gpu, SINGLE, 1000)
    assert not uses_compiler(config, gpu, SINGLE, 999)
    assert not uses_compiler(dataclasses.replace(config, compile="off"), gpu, SINGLE, 1000)
    for other in ({"device": CPU}, {"attn": "flex"}):
        assert not uses_compiler(config, dataclasses.replace(gpu, **other), SINGLE, 1000)
    monkeypatch.setattr(model_module, "has_triton", lambda: False)
    assert not uses_compiler(config, gpu, SINGLE, 1000)
