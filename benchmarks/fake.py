"""A model folder with the true shapes of a published model, and random weights in bfloat16.

The shapes are those of tests/published.json, the tokenizer is that of the family's golden
checkpoint: ``vlft sft``, ``infer`` and ``merge-lora`` run on the folder as on the published one.

    python -m benchmarks fake deepseek-vl-7b-chat /tmp/7b
    python -m benchmarks fake deepseek-vl-1.3b-chat /tmp/two-layers --layers 2
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import shutil
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.command import note
from tests.published import PUBLISHED
from vlft.families.registry import find_family

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.published import Published, Shapes

CHECKPOINTS = Path(__file__).parent.parent / "tests" / "golden" / "checkpoints"
# Family -> a small checkpoint of it, or of one with the same tokens, with its tokenizer.
GOLDEN = {
    "deepseek_vl": "deepseek-vl-siglip", "deepseek_vl_hybrid": "deepseek-vl-hybrid",
    "deepseek_vl2": "deepseek-vl2-mla", "janus": "janus-pro",
    "deepseek_ocr": "deepseek-ocr", "deepseek_ocr2": "deepseek-ocr2",
    "unlimited_ocr": "deepseek-ocr",
}  # fmt: skip
# preprocessor_config.json is left out: without it the size of images is the published models'.
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Fields of processor_config.json that are of the golden checkpoint's small images.
OF_SMALL_IMAGES = ("num_image_tokens", "candidate_resolutions", "patch_size", "downsample_ratio")
# Random numbers that the tensors are cut from.
BLOCK = 2**24


def main(arguments: list[str]) -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks fake",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", choices=sorted(short_name(p) for p in PUBLISHED), metavar="MODEL")
    add("out", type=Path, metavar="OUT", help="a new folder")
    add("--layers", type=int, help="of the LLM, of which the first are kept; default: all")
    options = parser.parse_args(arguments)
    write_fake(options.model, options.out, options.layers)
    note(f"{options.out}: {(options.out / 'model.safetensors').stat().st_size / 1e9:.1f} GB")


def short_name(model: Published) -> str:
    """The hub id without its owner."""
    return model.name.split("/")[-1]


def find_published(name: str) -> Published:
    """The published model of this short name."""
    return next(model for model in PUBLISHED if short_name(model) == name)


def golden_folder(model: Published) -> Path:
    """The golden checkpoint of the model's family."""
    family, _ = find_family(model.config, place=model.name)
    return CHECKPOINTS / GOLDEN[family.name]


def write_fake(name: str, out: Path, layers: int | None = None, *, weights: bool = True) -> None:
    """Makes the folder; ``layers`` is the number of the LLM's layers that are kept."""
    model = find_published(name)
    out.mkdir(parents=True)
    golden = golden_folder(model)
    for file in SMALL_FILES:
        shutil.copyfile(golden / file, out / file)
    settings = json.loads((golden / "processor_config.json").read_text("utf-8"))
    kept = {key: value for key, value in settings.items() if key not in OF_SMALL_IMAGES}
    (out / "processor_config.json").write_text(json.dumps(kept), "utf-8")
    # Janus' tells the names of user and assistant.
    version = json.loads((golden / "config.json").read_text("utf-8")).get("transformers_version")
    config = {"transformers_version": version, **copy.deepcopy(model.config)}
    shapes = model.tensors()
    if layers is not None:
        config["language_config"]["num_hidden_layers"] = layers
        shapes = {k: v for k, v in shapes.items() if _layer(k) < layers}
    (out / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    if weights:
        write_weights(out / "model.safetensors", shapes)


def _layer(name: str) -> int:
    """The number of the LLM's layer that a tensor belongs to; -1 if to none."""
    found = re.match(r"(?:language_model\.)?(?:model|language)\.(?:model\.)?layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def write_weights(path: Path, shapes: Shapes) -> None:
    """Writes a safetensors file of random bfloat16, in one pass with little memory.

    Weights are normal with a deviation of 0.02, scales of norms are 1, biases 0. All of them are
    cut from one block of random numbers, each tensor from another place on.
    """
    generator = torch.Generator().manual_seed(0)
    random = (0.02 * torch.randn(BLOCK, generator=generator)).bfloat16().view(torch.int16).numpy()
    one, zero = (torch.tensor(value).bfloat16().view(torch.int16).item() for value in (1.0, 0.0))
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for place, (name, shape) in enumerate(shapes.items()):
            if len(shape) < 2:
                value = one if name.endswith("weight") else zero
                file.write(torch.full(shape, value, dtype=torch.int16).numpy().data)
                continue
            for first, last in _cuts(prod(shape), 7919 * place % BLOCK):
                file.write(random[first:last].data)


def _cuts(count: int, start: int) -> Iterator[tuple[int, int]]:
    """Parts of the random block that make ``count`` numbers, the first one from ``start`` on."""
    while count > 0:
        end = min(BLOCK, start + count)
        yield start, end
        count -= end - start
        start = 0
