"""The published checkpoints. Plain facts, which the tests compare with the models themselves."""

from __future__ import annotations

from dataclasses import dataclass

from vlft.planning.sizes import Experts, Latent, TextSizes


@dataclass(frozen=True)
class Known:
    """A checkpoint on the hub.

    Attributes:
        id: owner/name.
        family: name of its family.
        billions: parameters that the files hold, in 1e9.
        image_tokens: least and most tokens that an image becomes.
        text: sizes of the LLM.
        scores: of a head of the SAM tower's attention; 0 without one.
    """

    id: str
    family: str
    billions: float
    image_tokens: tuple[int, int]
    text: TextSizes
    scores: int = 0


LLAMA_1B = TextSizes(102400, hidden=2048, inner=5632, layers=24, heads=16, key_heads=16, head=128)
LLAMA_7B = TextSizes(102400, hidden=4096, inner=11008, layers=30, heads=32, key_heads=32, head=128)
LATENT = Latent(rank=512, query_rank=0, plain=128, rotary=64, value=128)
TINY = TextSizes(
    129280, hidden=1280, inner=6848, layers=12, heads=10, key_heads=10, head=128,
    experts=Experts(routed=64, best=6, shared=2, width=896, dense=1, corrected=False),
)  # fmt: skip
SMALL = TextSizes(
    102400, hidden=2048, inner=10944, layers=27, heads=16, key_heads=16, head=128, latent=LATENT,
    experts=Experts(routed=64, best=6, shared=2, width=1408, dense=1, corrected=False),
)  # fmt: skip
BASE = TextSizes(
    129280, hidden=2560, inner=12288, layers=30, heads=32, key_heads=32, head=80, latent=LATENT,
    experts=Experts(routed=72, best=6, shared=2, width=1536, dense=1, corrected=True),
)  # fmt: skip


def _known(name: str, family: str, text: TextSizes, billions: float, *tokens: int) -> Known:
    # 12 heads, 64 x 64 patches.
    scores = 64**4 if family == "deepseek_vl_hybrid" else 0
    return Known(f"deepseek-ai/{name}", family, billions, (tokens[0], tokens[-1]), text, scores)


KNOWN: tuple[Known, ...] = (
    _known("deepseek-vl-1.3b-base", "deepseek_vl", LLAMA_1B, 1.98, 576),
    _known("deepseek-vl-1.3b-chat", "deepseek_vl", LLAMA_1B, 1.98, 576),
    _known("deepseek-vl-7b-base", "deepseek_vl_hybrid", LLAMA_7B, 7.34, 576),
    _known("deepseek-vl-7b-chat", "deepseek_vl_hybrid", LLAMA_7B, 7.34, 576),
    _known("deepseek-vl2-tiny", "deepseek_vl2", TINY, 3.37, 421, 2101),
    _known("deepseek-vl2-small", "deepseek_vl2", SMALL, 16.15, 421, 2101),
    _known("deepseek-vl2", "deepseek_vl2", BASE, 27.48, 421, 2101),
    _known("Janus-1.3B", "janus", LLAMA_1B, 2.09, 576),
    _known("Janus-Pro-1B", "janus", LLAMA_1B, 2.09, 576),
    _known("Janus-Pro-7B", "janus", LLAMA_7B, 7.42, 576),
)
