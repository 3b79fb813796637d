"""Sizes of the models that are measured: one for each kind of architecture, middle and tiny."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlft.planning.sizes import Experts

if TYPE_CHECKING:
    from vlft.families.base import Tiles


@dataclass(frozen=True)
class LargeTower:
    """The SAM tower beside the SigLIP tower.

    Attributes:
        width: of its layers.
        layers: of which every second sees the whole image, the others windows.
        heads: of its attention.
        channels: of its neck.
        image_size: pixels of a side.
        patch_size: pixels of a side.
    """

    width: int
    layers: int
    heads: int
    channels: int
    image_size: int = 1024
    patch_size: int = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        family: by name.
        hidden: width of the LLM.
        intermediate: inner width of its dense feed-forward layers.
        layers: of the LLM.
        heads: of the LLM.
        vision_width: of the SigLIP tower.
        vision_layers: of the SigLIP tower.
        vision_heads: of the SigLIP tower.
        patch_size: of the SigLIP tower, pixels.
        image_size: of the SigLIP tower, pixels.
        vocabulary: tokens; the last one marks images.
        tiles: (across, down) that each image is cut into beside its whole view.
        experts: of the LLM, if it has some.
        large_tower: beside the SigLIP tower, if there is one.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    patch_size: int
    image_size: int = 384
    vocabulary: int = 51200
    tiles: Tiles = (0, 0)
    experts: Experts | None = None
    large_tower: LargeTower | None = None

    @property
    def image_token_id(self) -> int:
        """Id of the token that marks images."""
        return self.vocabulary - 1


PLAIN = Shape(
    family="deepseek_vl",
    hidden=512,
    intermediate=1408,
    layers=8,
    heads=8,
    vision_width=512,
    vision_layers=6,
    vision_heads=8,
    patch_size=16,
)
MIDDLE = {
    "deepseek-vl": PLAIN,
    "deepseek-vl2": replace(
        PLAIN,
        family="deepseek_vl2",
        layers=6,
        vision_layers=4,
        patch_size=14,
        tiles=(2, 1),
        experts=Experts(routed=32, best=6, shared=2, width=256, dense=1, corrected=False),
    ),
    "deepseek-vl-hybrid": replace(
        PLAIN,
        family="deepseek_vl_hybrid",
        layers=6,
        vision_layers=4,
        large_tower=LargeTower(width=256, layers=4, heads=4, channels=256),
    ),
}


def _tiny(shape: Shape) -> Shape:
    """The same architecture, for a quick look; its patches are large, so that they are few."""
    small = replace(
        shape,
        hidden=64,
        intermediate=96,
        layers=2,
        heads=4,
        vision_width=32,
        vision_layers=2,
        vision_heads=4,
        patch_size=128,
        vocabulary=512,
    )
    if shape.experts:
        experts = replace(shape.experts, routed=8, best=3, width=32)
        small = replace(small, experts=experts)
    if shape.large_tower:
        tower = LargeTower(width=32, layers=2, heads=4, channels=8, patch_size=128)
        small = replace(small, large_tower=tower)
    return small


SCALES = {"middle": MIDDLE, "tiny": {name: _tiny(shape) for name, shape in MIDDLE.items()}}
