"""Functions that torch's compiler leaves as they are: what it makes ends before their calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


def uncompiled(function: F) -> F:
    """The function, which is called and not traced; a decorator that keeps its type."""
    return cast("F", torch.compiler.disable(function))
