"""The last step of the base's recipe: stores a trained checkpoint in bfloat16.

python sample_data/store_base.py CHECKPOINT sample_data/tiny-vl
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from vlft.checkpoints.export import export_model
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import resolve_placement


def main() -> None:
    """Replaces the folder."""
    source, target = describe(Path(sys.argv[1])), Path(sys.argv[2])
    placement = resolve_placement(dtype="float32", device="cpu", quantize="none")
    model = load_model(source, placement)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    export_model(model, source, target, layout="original", dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
