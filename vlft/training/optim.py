"""Optimiser and learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

# The names that transformers gives to what comes after the warm-up.
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over what trains; no decay on vectors (biases, norms, magnitudes)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate)


def make_scheduler(
    optimizer: torch.optim.Optimizer, name: str, steps: int, warmup_ratio: float
) -> Any:
    """The learning rate of each of ``steps`` steps: a linear warm-up, then the named shape."""
    return get_scheduler(
        SCHEDULERS[name],
        optimizer,
        num_warmup_steps=round(steps * warmup_ratio),
        num_training_steps=steps,
    )
