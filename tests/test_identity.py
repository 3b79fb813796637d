"""The digest of a model's weights tells others apart, and not the ways to store the same ones."""

from __future__ import annotations

import pytest
import torch
from conftest import MATRIX

from vlft.checkpoints import identity
from vlft.checkpoints.export import export_model
from vlft.checkpoints.identity import is_other, weights_digest
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture
def written(folder, tmp_path):
    """A function that writes the model, changed or not, and gives the digest of what it wrote."""

    def write(name, *, layout="original", dtype=None, size="5GB", change=None):
        model = load_model(folder, CPU, keep_dtypes=dtype is None)
        if change is not None:
            change(dict(model.named_parameters()))
        (tmp_path / name).mkdir()
        export_model(
            model, folder, tmp_path / name, layout=layout, dtype=dtype, max_shard_size=size
        )
        return weights_digest(describe(tmp_path / name))

    return write


@pytest.mark.parametrize("case", MATRIX, indirect=True, ids=str, scope="session")
@pytest.mark.parametrize("numbers", [2**24, 2**14])
def test_the_same_weights_in_other_files(folder, written, monkeypatch, numbers):
    monkeypatch.setattr(identity, "_NUMBERS", numbers)
    expected = weights_digest(folder)
    assert written("shards", size="200KB") == expected
    assert written("wide", dtype=torch.float32) == expected
    if folder.family.has_transformers_layout:
        assert written("native", layout="transformers") == expected


@pytest.mark.parametrize("numbers", [2**24, 2**14])
def test_other_weights_of_the_same_sizes(folder, written, monkeypatch, numbers):
    """All of a small model is read; of a large one enough of each tensor to notice a merge."""
    monkeypatch.setattr(identity, "_NUMBERS", numbers)
    leaf = folder.family.attention_inputs[0]

    def merge(parameters):
        name = next(n for n in sorted(parameters) if n.endswith(f"{leaf}.weight"))
        weight = parameters[name].data
        weight += 0.02 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))

    def poke(parameters):
        parameters["lm_head.weight"].data[-1, -1] += 1

    expected = weights_digest(folder)
    for name, change in (("merge", merge), ("poke", poke)):
        assert written(name, change=change) != expected


def test_an_expert_of_its_own(folder, written):
    experts = [n for n, _ in load_model(folder, CPU).named_parameters() if "gate_up_proj" in n]
    if not experts:
        pytest.skip("no experts")

    def swap(parameters):
        weight = parameters[experts[0]].data
        weight[[0, 1]] = weight[[1, 0]]

    assert written("swapped", change=swap) != weights_digest(folder)


def test_digests_of_other_releases_are_not_compared(folder):
    found = weights_digest(folder)
    assert is_other(f"{found[:-1]}x", found)
    assert not is_other(found, found)
    assert not is_other("0:abc", found)
    assert not is_other("", found)
