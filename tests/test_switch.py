"""Adapters that are put into one base in turn, whatever their kind."""

from __future__ import annotations

import pytest
import torch
from conftest import SIGLIP, VL2_NOAUX, logits
from served import make_adapter

from vlft.checkpoints.adapter import load_adapter
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.switch import Adapters
from vlft.errors import CheckpointError

ON_CPU = Placement(torch.device("cpu"), torch.float32)
KINDS = {
    SIGLIP: [{"train_aligner": True}, {"target_modules": "ALL", "use_dora": True}],
    VL2_NOAUX: [{"target_modules": "experts"}, {"target_modules": "ALL"}],
}


@pytest.mark.parametrize("case", KINDS, indirect=True, ids=str)
def test_each_is_as_alone_and_the_base_as_before(case, inputs, tmp_path):
    folders = {
        f"adapter {number}": make_adapter(case.folder, tmp_path / str(number), number, **options)
        for number, options in enumerate(KINDS[case])
    }
    base = load_model(describe(case.folder), ON_CPU)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = {None: logits(base, inputs)}
    for name, folder in folders.items():
        alone = load_adapter(load_model(describe(case.folder), ON_CPU), folder)
        expected[name] = logits(alone, inputs)
    adapters = Adapters(base)
    for name, folder in folders.items():
        adapters.add(name, folder)
    for name in (None, *folders, *reversed(folders), None):
        assert torch.equal(logits(adapters.use(name), inputs), expected[name])
    assert not torch.equal(expected[None], expected["adapter 0"])
    after = base.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_parts_that_were_trained_fully_are_taken_back(tmp_path):
    """peft's modules_to_save has whole weights in the place of the base's."""
    from peft import LoraConfig, get_peft_model

    base = load_model(describe(SIGLIP.folder), ON_CPU)
    names = ["lm_head"]
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=names, task_type="CAUSAL_LM")
    tuned = get_peft_model(load_model(describe(SIGLIP.folder), ON_CPU), config)
    head = tuned.base_model.model.lm_head.modules_to_save["default"]
    head.weight.data.add_(1.0)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    before = base.lm_head.weight.clone()
    adapters = Adapters(base)
    adapters.add("whole head", tmp_path)
    assert torch.equal(base.lm_head.weight, before)
    adapters.use("whole head")
    assert torch.equal(base.lm_head.weight, before + 1.0)
    adapters.use(None)
    assert torch.equal(base.lm_head.weight, before)


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_one_that_changes_the_base_is_refused(tmp_path, start):
    folder = make_adapter(SIGLIP.folder, tmp_path / "a", 0, init=start)
    base = load_model(describe(SIGLIP.folder), ON_CPU)
    with pytest.raises(CheckpointError, match=f"started with {start}, which changes the base"):
        Adapters(base).add("a", folder)
    assert not hasattr(base, "peft_config")
