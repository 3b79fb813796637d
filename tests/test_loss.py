"""The chunked loss against the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlft.training import loss as module
from vlft.training.loss import token_loss_sum


@pytest.fixture
def problem():
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False)
    hidden = torch.randn(37, 16, requires_grad=True)
    target = torch.randint(0, 50, (37,))
    weight = torch.randint(1, 4, (37,)).float()
    return hidden, target, weight, head


@pytest.mark.parametrize("chunk", [1, 10, 37, 512])
def test_same_value_and_gradients(problem, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, target, weight, head = problem
    plain = (F.cross_entropy(head(hidden), target, reduction="none") * weight).sum()
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    value = token_loss_sum(hidden, target, weight, head)
    found = torch.autograd.grad(value, [hidden, head.weight])
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(found, expected)


def test_no_tensor_of_all_logits(problem, monkeypatch):
    """The head never sees more positions than a chunk."""
    monkeypatch.setattr(module, "CHUNK", 8)
    hidden, target, weight, head = problem
    seen = []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda rows: seen.append(len(rows)) or forward(rows))
    token_loss_sum(hidden, target, weight, head).backward()
    assert max(seen) == 8
    # Once: the backward pass recomputes nothing.
    assert sum(seen) == 37


@pytest.mark.parametrize("chunk", [10, 512])
def test_a_frozen_head_gets_no_gradient(problem, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, target, weight, head = problem
    head.requires_grad_(False)
    token_loss_sum(hidden, target, weight, head).backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_without_gradients_the_same_value(problem):
    hidden, target, weight, head = problem
    with torch.no_grad():
        value = token_loss_sum(hidden, target, weight, head)
    assert not value.requires_grad
    torch.testing.assert_close(value, token_loss_sum(hidden, target, weight, head).detach())


def test_no_targets_is_zero(problem):
    hidden, target, weight, head = problem
    assert token_loss_sum(hidden[:0], target[:0], weight[:0], head).item() == 0.0


def test_half_precision_sums_in_float32(problem):
    hidden, target, weight, head = problem
    value = token_loss_sum(hidden.bfloat16(), target, weight, head.bfloat16())
    assert value.dtype == torch.float32
