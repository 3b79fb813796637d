"""Compares the token ids of stock AutoProcessor on a folder in transformers' layout with vlft's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.errors import REPORT, VerificationError, shown

if TYPE_CHECKING:
    from vlft.checkpoints.locate import ModelFolder

_TEXTS = ("What do you see in 12 words?", "Köln, 你好: x = 3.14\n\n- a", "  Yes.  ")


def sample_image(folder: Path) -> Path:
    """An image file with many colours and edges, written into the folder."""
    from PIL import Image

    size = 64
    image = Image.new("RGB", (size, size))
    places = [(x, y) for y in range(size) for x in range(size)]
    image.putdata([(4 * x, 4 * y, 255 * ((x // 8 + y // 8) % 2)) for x, y in places])
    path = folder / "sample.png"
    image.save(path)
    return path


def check_stock_ids(folder: ModelFolder) -> None:
    """Raises VerificationError if AutoProcessor's ids of a conversation are not vlft's.

    Not checked are the authors' layout, which no class of transformers reads, and families without
    a chat template.
    """
    if folder.layout == "original" or folder.family.template is None:
        return
    from transformers import AutoProcessor

    stock: Any = AutoProcessor.from_pretrained(folder.path)
    first, second, reply = _TEXTS
    # In the output folder: after a kill the next run removes it, which nobody does in TMPDIR.
    with tempfile.TemporaryDirectory(dir=folder.path) as name:
        image = str(sample_image(Path(name)))
        for system in (None, "Be brief."):
            row = {"query": second, "history": [[f"<image>{first}", reply]], "images": [image]}
            expected = folder.processor().encode({**row, "system": system}).input_ids.tolist()
            parts = [{"type": "image", "path": image}, {"type": "text", "text": first}]
            messages = [
                *([{"role": "system", "content": system}] if system else []),
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": reply}]},
                {"role": "user", "content": [{"type": "text", "text": second}]},
            ]
            found = stock.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            if [int(token) for token in found[0]] != expected:
                raise VerificationError(
                    "transformers' AutoProcessor gives other token ids than vlft",
                    place=shown(folder.path),
                    hint=f"{REPORT}; --format original writes the authors' layout",
                )
