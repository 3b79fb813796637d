"""Drawing: vlft against a plain loop over transformers' Janus ``generate``.

Both draw images of a prompt with guidance, from tokens to pixels, by the same Janus with random
weights, whose tokenizer is that of sample_data/draw/tiny-janus. Sampled drawings are measured;
of greedy ones the codes are compared.

    python -m benchmarks draw --threads 1 --clock cpu --output benchmarks/results/draw-cpu
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from benchmarks.command import DTYPES, new_parser, prepare, publish
from benchmarks.measure import measure
from vlft.checkpoints.locate import describe
from vlft.inference.draw import draw_batch, drawing_prompt
from vlft.inference.guided import Guidance, Order

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from torch import Tensor

    from vlft.data.encode import EncodedSample
    from vlft.families.processor import Processor

TINY = Path(__file__).parent.parent / "sample_data" / "draw" / "tiny-janus"
PROMPT = "Please draw a red square!"
# Hidden size, of the MLP, layers, heads, codes along a side.
SCALES = {"middle": (512, 1408, 8, 8, 12), "tiny": (64, 96, 2, 4, 4)}
COLUMNS = {
    "images": "{batch}", "transformers, images/s": "{plain_rate:.3f}",
    "vlft, images/s": "{vlft_rate:.3f}", "times as fast": "{ratio:.2f}",
    "equal codes": "{equal:.3f}",
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Measures, prints the table, writes the files."""
    parser = new_parser("draw", __doc__, repeats=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--scale", default="middle", choices=sorted(SCALES))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options = parser.parse_args(arguments)
    device, content = prepare(options)
    model, processor = random_janus(options.scale, DTYPES[options.dtype], device)
    row = {"query": PROMPT, "system": ""}
    prompt = drawing_prompt(processor.encode(row), processor)
    results = [
        {"batch": batch, **compare(model, processor, prompt, batch, options)}
        for batch in options.batches
    ]
    publish(options, content, COLUMNS, results)


def random_janus(scale: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Processor]:
    """A model of transformers' class, and the processor that belongs to it."""
    hidden, mlp, layers, heads, side = SCALES[scale]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in TINY.glob("tokenizer*.json"):
            shutil.copy(path, folder)
        config = json.loads((TINY / "config.json").read_text("utf-8"))
        config["language_config"] |= {
            "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
        }  # fmt: skip
        patch = config["vision_config"]["params"]["patch_size"]
        config["vision_config"]["params"]["image_size"] = side * patch
        for part in ("aligner_config", "gen_aligner_config"):
            config[part]["params"]["n_embed"] = hidden
        head = {"image_token_embed": hidden, "n_embed": hidden}
        config["gen_head_config"]["params"] |= head
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        source = describe(folder)
        cls, native = source.family.model_class(), source.native_config()
        processor = source.processor()
    torch.manual_seed(0)
    made = cls.config_class(**native)
    model = cls._from_config(made, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False).to(device), processor


def compare(
    model: Any,
    processor: Processor,
    prompt: EncodedSample,
    batch: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Images a second of both sides, in turns, and the share of equal greedy codes."""
    sides = {
        "plain": partial(draw_plainly, model, processor, prompt, batch),
        "vlft": partial(draw_with_vlft, model, processor, prompt, batch),
    }
    one, other = (side(0.0) for side in sides.values())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            found = measure(partial(_sampled, side), model.device, options.clock)
            seconds[name].append(found.seconds)
    rates = {name: batch / statistics.median(times) for name, times in seconds.items()}
    return {
        **{f"{name}_rate": rate for name, rate in rates.items()},
        "ratio": rates["vlft"] / rates["plain"],
        "equal": float((one == other).float().mean()),
        "seconds": seconds,
    }


def _sampled(side: Callable[[float], Tensor]) -> float:
    return float(side(1.0).sum())


def draw_with_vlft(
    model: Any, processor: Processor, prompt: EncodedSample, batch: int, temperature: float
) -> Tensor:
    """(B, K) codes of images that were decoded too."""
    guidance = Guidance(temperature=temperature)
    drawn = draw_batch(model, processor, [Order(prompt, range(batch))], guidance)
    return torch.stack([drawing.codes for drawing in drawn])


@torch.inference_mode()
def draw_plainly(
    model: Any, processor: Processor, prompt: EncodedSample, batch: int, temperature: float
) -> Tensor:
    """As ``draw_with_vlft``, as transformers' documentation does it."""
    (start,) = processor.chat.image_border[0]
    settings = GenerationConfig(
        do_sample=temperature > 0,
        guidance_scale=Guidance().cfg_weight,
        bos_token_id=int(prompt.input_ids[0]),
        pad_token_id=processor.chat.pad_id,
        generation_kwargs={"boi_token_id": start},
        max_length=len(prompt) + (processor.pixels.tokens or 0),
    )
    ids = prompt.input_ids.repeat(batch, 1).to(model.device)
    codes: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        generation_mode="image",
    )
    model.decode_image_tokens(codes)
    return codes.cpu()
