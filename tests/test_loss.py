"""The chunked loss against the plain one."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("at_once", [1, 150, 2**20])
@pytest.mark.parametrize("chunk", [1, 10, 37, 512])
def test_same_value_and_gradients(problem, chunk, at_once, monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", at_once)
    hidden, target, weight, head = problem
    plain = (F.cross_entropy(head(hidden), target, reduction="none") * weight).sum()
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    value = token_loss_sum(hidden, target, weight, head)
    found = torch.autograd.grad(value, [hidden, head.weight])
    assert_close(value, plain, "loss")
    assert_close(found, expected, "layer gradients")


def test_in_16_bit_few_logits_have_a_copy_in_float32(problem, monkeypatch):
    """The copies have no bound but this one, and the gradient overwrites the logits."""
    monkeypatch.setitem(module.LOGITS_AT_ONCE, "cpu", 150)
    hidden, target, weight, head = problem
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype is torch.float32:
                largest.append(result.numel())
            return result

    rows = hidden.detach().bfloat16().requires_grad_()
    with Watch():
        token_loss_sum(rows, target, weight, head.bfloat16().requires_grad_(False)).backward()
    assert max(largest) == 150


def test_no_tensor_of_all_logits(problem, monkeypatch):
    """The head never sees more positions than a chunk."""
    monkeypatch.setitem(module.CHUNK, "cpu", 8)
    hidden, target, weight, head = problem
    seen = []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda rows: seen.append(len(rows)) or forward(rows))
    token_loss_sum(hidden, target, weight, head).backward()
    assert max(seen) == 8
    # Each position is seen once: the backward pass recomputes nothing.
    assert sum(seen) == 37


@pytest.mark.parametrize("chunk", [10, 512])
def test_a_frozen_head_gets_no_gradient(problem, chunk, monkeypatch):
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)
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
    assert_close(value, token_loss_sum(hidden, target, weight, head).detach(), "loss")


def test_no_targets_is_zero(problem):
    hidden, target, weight, head = problem
    assert token_loss_sum(hidden[:0], target[:0], weight[:0], head).item() == 0.0


def test_half_precision_sums_in_float32(problem):
    hidden, target, weight, head = problem
    value = token_loss_sum(hidden.bfloat16(), target, weight, head.bfloat16())
    assert value.dtype == torch.float32


@pytest.mark.parametrize("copies", [1, 300])
def test_gradients_of_a_confident_model_do_not_underflow_in_float16(copies):
    """Errors are smaller than the plain loss's, also where many samples share a target."""
    torch.manual_seed(0)
    head = nn.Linear(64, 2000, bias=False)
    target = torch.arange(8)
    with torch.no_grad():
        head.weight.mul_(0.2)
        head.weight[:8] = 2.5 * F.normalize(torch.randn(8, 64))
        states = head.weight[:8] * 3
    head.requires_grad_(False).half()
    weight = torch.full((8,), float(copies))
    scaler = 65536.0 / weight.sum()
    errors = []
    exact = states.half().double().requires_grad_()
    (F.cross_entropy(exact @ head.weight.double().T, target, reduction="sum") * copies).backward()
    for loss_of in (
        lambda rows: token_loss_sum(rows, target, weight, head),
        lambda rows: (F.cross_entropy(head(rows).float(), target, reduction="none") * weight).sum(),
    ):
        rows = states.half().requires_grad_()
        (loss_of(rows) * scaler).backward()
        errors.append((rows.grad.double() / scaler - exact.grad).norm() / exact.grad.norm())
    # The plain loss rounds 1 - p to float32.
    assert errors[0] < 0.005 < 0.05 < errors[1]


def test_the_gradient_of_a_certain_target_is_not_rounded_to_zero():
    """Of a target with a probability of 1 - 4e-11 the plain formula, p - 1, is 0 in float32."""
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[24.0], [0.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    token_loss_sum(hidden, torch.tensor([0]), torch.ones(1), head.requires_grad_(False)).backward()
    exact = -24.0 / (1 + math.exp(24.0))
    assert hidden.grad.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("trains", [True, False])
def test_autocast_does_not_round_the_sum(problem, trains):
    hidden, target, weight, head = problem
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trains):
        value = token_loss_sum(hidden, target, weight, head)
        logits = head(hidden)
    plain = F.cross_entropy(logits.float(), target, reduction="none") * weight
    assert_close(value, plain.sum(), "loss")
