"""The published checkpoints. Plain facts, which the tests compare with the models themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A checkpoint on the hub.

    Attributes:
        id: owner/name.
        family: name of its family.
        billions: parameters that the files hold, in 1e9.
        image_tokens: least and most tokens that a picture becomes.
    """

    id: str
    family: str
    billions: float
    image_tokens: tuple[int, int]


def _known(name: str, family: str, billions: float, *tokens: int) -> Known:
    return Known(f"deepseek-ai/{name}", family, billions, (tokens[0], tokens[-1]))


KNOWN: tuple[Known, ...] = (
    _known("deepseek-vl-1.3b-base", "deepseek_vl", 1.98, 576),
    _known("deepseek-vl-1.3b-chat", "deepseek_vl", 1.98, 576),
    _known("deepseek-vl-7b-base", "deepseek_vl_hybrid", 7.34, 576),
    _known("deepseek-vl-7b-chat", "deepseek_vl_hybrid", 7.34, 576),
    _known("deepseek-vl2-tiny", "deepseek_vl2", 3.37, 421, 2101),
    _known("deepseek-vl2-small", "deepseek_vl2", 16.15, 421, 2101),
    _known("deepseek-vl2", "deepseek_vl2", 27.48, 421, 2101),
    _known("Janus-1.3B", "janus", 2.09, 576),
    _known("Janus-Pro-1B", "janus", 2.09, 576),
    _known("Janus-Pro-7B", "janus", 7.42, 576),
)
