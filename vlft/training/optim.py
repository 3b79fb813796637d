"""Optimiser and learning rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

# --lr-scheduler -> transformers' name of the schedule.
SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the trained parameters; no weight decay on vectors (biases, norms, magnitudes)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate)


def make_scheduler(
    optimizer: torch.optim.Optimizer, name: str, steps: int, warmup_ratio: float
) -> Any:
    """A learning rate schedule over ``steps`` steps: linear warm-up, then the named shape."""
    return get_scheduler(
        SCHEDULERS[name],
        optimizer,
        num_warmup_steps=round(steps * warmup_ratio),
        num_training_steps=steps,
    )
