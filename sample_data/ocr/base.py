"""Makes and trains the tiny base of this folder: a DeepSeek-OCR checkpoint in the authors' layout.

    python sample_data/ocr/base.py WORK_DIR --out sample_data/ocr/tiny-ocr

About twenty minutes of one core, from random weights. First towers and projector learn which
characters stand in the region of an image token, from a classifier that is thrown away; then, with
the towers frozen, the LLM learns to write plain pages (pages.py) line by line. It never sees
markdown. WORK_DIR/state.pt is written every two minutes, and a second start goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pages import ALPHABET, QUERY, Glyph, Page, draw, plain_page
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from tokenizers import pre_tokenizers as pre
from torch import Tensor, nn
from torch.nn import functional as F

from vlft.checkpoints.export import export_model
from vlft.checkpoints.load import empty_model
from vlft.checkpoints.locate import describe
from vlft.families.deepseek_ocr import ARCHITECTURE, FAMILY, TOWER

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

HIDDEN, DENSE, EXPERT, EXPERTS, TOP_K, SHARED, LAYERS, HEADS = 96, 192, 64, 4, 2, 1, 3, 4
SAM, SAM_LAYERS, SAM_HEADS, NECK, CONVOLUTION = 40, 2, 2, 32, 48
CLIP, CLIP_LAYERS, CLIP_HEADS = 64, 2, 4
MAX_LENGTH = 1024
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
OTHERS = (
    "<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>",
    "<td>", "</td>", "<tr>", "</tr>", "<|User|>", "<|Assistant|>",
)  # fmt: skip

CELLS, SLOTS = 8, 4  # image tokens along a side in mode tiny; characters told apart in each
BATCH = 8
# Images of the first stage; pages of the second, and images, each page several times.
READING, PAGES, WRITING = 16_000, 3_000, 40_000
PEAK, WARM_UP = 2e-3, 800  # learning rate; images until it is reached


def main() -> None:
    """Trains and stores the base."""
    parser = argparse.ArgumentParser(description="Train the tiny OCR base.")
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reading", type=int, default=READING, help="images of the first stage")
    parser.add_argument("--pages", type=int, default=PAGES, help="pages of the second stage")
    parser.add_argument("--writing", type=int, default=WRITING, help="images of the second stage")
    options = parser.parse_args()
    skeleton = options.work_dir / "skeleton"
    write_small_files(skeleton)
    torch.manual_seed(0)
    base = describe(skeleton)
    model: Any = empty_model(base, "eager")
    initialise(model)
    model.train()
    head = nn.Sequential(
        nn.Linear(HIDDEN, 256), nn.GELU(), nn.Linear(256, SLOTS * (len(ALPHABET) + 1))
    )
    train(model, head, base.processor(), options)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    export_model(model, base, options.out, layout="original", dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.2f} MB")


def train(model: Any, head: nn.Module, processor: Any, options: argparse.Namespace) -> None:
    """Both stages, from the last saved state on."""
    parts = model.model
    towers = [*parts.vision_tower.parameters(), *parts.multi_modal_projector.parameters()]
    state = State(options.work_dir / "state.pt", nn.ModuleList([model, head]))
    run_stage(
        state,
        "reading",
        [*towers, *head.parameters()],
        options.reading,
        lambda seen: reading_loss(model, head, processor, seen),
    )
    parts.vision_tower.requires_grad_(False)
    pages = seen_pages(model, processor, options.pages)
    writers = [p for p in model.parameters() if p.requires_grad]
    run_stage(
        state,
        "writing",
        writers,
        options.writing,
        lambda seen: writing_loss(model, processor, pages, seen),
    )


class State:
    """What a second start goes on from."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        self._path, self._model, self._last = path, model, time.perf_counter()
        self.seen: dict[str, int] = {}
        self._optimizer: dict[str, Any] = {}
        if path.is_file():
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
            self.seen, self._optimizer = saved["seen"], saved["optimizer"]

    def resume(self, stage: str, optimizer: torch.optim.Optimizer) -> int:
        """Images seen in a stage before."""
        if self._optimizer and stage == list(self.seen)[-1]:
            optimizer.load_state_dict(self._optimizer)
        return self.seen.get(stage, 0)

    def save(self, stage: str, seen: int, optimizer: torch.optim.Optimizer, *, now: bool) -> None:
        """Writes the file, whole or not at all, every two minutes or now."""
        if not now and time.perf_counter() - self._last < 120:
            return
        self._last = time.perf_counter()
        self.seen[stage] = seen
        content = {"model": self._model.state_dict(), "seen": self.seen}
        new = self._path.with_suffix(".new")
        torch.save({**content, "optimizer": optimizer.state_dict()}, new)
        new.replace(self._path)


def run_stage(
    state: State,
    stage: str,
    parameters: list[nn.Parameter],
    count: int,
    loss_at: Callable[[int], Tensor],
) -> None:
    """Trains these parameters on ``count`` images."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    seen = state.resume(stage, optimizer)
    started, losses = time.perf_counter(), []
    while seen < count:
        course = (1 + math.cos(math.pi * seen / count)) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK * (0.02 + 0.98 * course) * min(1, (seen + BATCH) / WARM_UP)
        loss = loss_at(seen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seen += BATCH
        losses.append(loss.item())
        if len(losses) == 25 or seen >= count:
            mean, seconds = sum(losses) / len(losses), time.perf_counter() - started
            print(f"{stage} {seen:7} {seconds:6.0f} s {mean:.3f}", flush=True)
            losses = []
        state.save(stage, seen, optimizer, now=seen >= count)


def reading_loss(model: Any, head: nn.Module, processor: Any, seen: int) -> Tensor:
    """Mean cross-entropy of the characters in each image token."""
    # Full pages, so that an image shows many characters.
    made = [printed(seen + index, rows=(4, 5)) for index in range(BATCH)]
    views = torch.cat([view_of(image, processor) for _, image, _ in made])
    with torch.autocast("cpu", torch.bfloat16):
        features = FAMILY.vision_features(model, {"pixel_values": views}).float()
    cells = torch.cat([cell_classes(glyphs) for _, _, glyphs in made])
    scores = head(model.model.multi_modal_projector(features))
    return F.cross_entropy(scores.view(-1, len(ALPHABET) + 1), cells)


def printed(index: int, rows: tuple[int, int]) -> tuple[Page, Image, list[Glyph]]:
    """Page ``index`` of the base, its image, and what stands where."""
    rng = random.Random(f"base {index}")
    page = plain_page(rng, rows)
    return (page, *draw(page, rng))


def view_of(image: Image, processor: Any) -> Tensor:
    """(1, 3, 512, 512), the view of a page."""
    (view,) = processor.pixels.transform(image.convert("RGB"), (0, 0))
    return view


@torch.no_grad()
def seen_pages(model: Any, processor: Any, count: int) -> list[tuple[str, Tensor]]:
    """Texts and tower features, (64, W) bfloat16, of ``count`` pages."""
    found = []
    for index in range(count):
        page, image, _ = printed(-1 - index, rows=(1, 5))
        features = FAMILY.vision_features(model, {"pixel_values": view_of(image, processor)})
        found.append((page.plain, features.bfloat16()))
    return found


def writing_loss(model: Any, processor: Any, pages: list[tuple[str, Tensor]], seen: int) -> Tensor:
    """Mean cross-entropy of the text of the next pages."""
    batch = [pages[(seen + index) % len(pages)] for index in range(BATCH)]
    features = torch.cat([features for _, features in batch]).float()
    images = FAMILY.align(model, features, [(0, 0)] * BATCH).view(BATCH, -1, HIDDEN)
    return text_loss(model, processor, images, [text for text, _ in batch])


def cell_classes(glyphs: list[Glyph]) -> Tensor:
    """(64 * SLOTS,) classes: the characters in each image token from left to right, 0 for none."""
    classes = torch.zeros(CELLS, CELLS, SLOTS, dtype=torch.long)
    filled = [[0] * CELLS for _ in range(CELLS)]
    for glyph in glyphs:
        row, column = (min(CELLS - 1, max(0, int(part * CELLS))) for part in (glyph.y, glyph.x))
        if filled[row][column] < SLOTS:
            classes[row, column, filled[row][column]] = 1 + ALPHABET.index(glyph.text)
            filled[row][column] += 1
    return classes.view(-1)


def text_loss(model: Any, processor: Any, images: Tensor, texts: list[str]) -> Tensor:
    """Mean next-token cross-entropy of the replies; images are (B, tokens, D)."""
    tokenizer = processor.chat.tokenizer
    prompt = tokenizer.encode(QUERY.removeprefix("<image>"), add_special_tokens=False)
    prompt = getattr(prompt, "ids", prompt)
    replies = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        replies.append([*getattr(ids, "ids", ids), 1])
    longest = max(map(len, replies))
    targets = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in replies])
    embed = model.get_input_embeddings()
    start = embed(torch.zeros(len(texts), 1, dtype=torch.long))
    asked = embed(torch.tensor([prompt] * len(texts)))
    inputs = torch.cat([start, images, asked, embed(targets[:, :-1].clamp(min=0))], dim=1)
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    scores = model.lm_head(hidden[:, -longest:])
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100)


def initialise(model: nn.Module) -> None:
    """Random weights that keep the variance of a layer's input, less at the end of a branch."""
    ends = ("o_proj", "down_proj", "out_proj", "fc2", "lin2", "attn.proj")
    for name, empty in list(model.named_parameters()):
        place, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(torch.empty(empty.shape))
        model.get_submodule(place).register_parameter(leaf, parameter)
        with torch.no_grad():
            if name.endswith("pos_embed") or "position_embedding" in name:
                parameter.normal_(std=0.05)
            elif parameter.dim() == 1 or "rel_pos" in name:
                _set_vector(name, parameter)
            else:
                fan_in = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
                gain = 0.4 if any(end in name for end in ends) else 1.0
                embedding = "embed_tokens" in name
                parameter.normal_(std=0.3 if embedding else gain * fan_in**-0.5)


def _set_vector(name: str, parameter: Tensor) -> None:
    if "norm" in name and name.endswith("weight"):
        parameter.fill_(1.0)
    elif name.endswith(("image_newline", "view_separator", "class_embedding")):
        parameter.normal_(std=0.3)
    else:
        parameter.zero_()


def write_small_files(folder: Path) -> None:
    """Configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = -(-tokenizer.get_vocab_size() // 16) * 16
    language = {
        "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 1, "hidden_size": HIDDEN,
        "intermediate_size": DENSE, "kv_lora_rank": None, "lm_head": True,
        "max_position_embeddings": MAX_LENGTH, "moe_intermediate_size": EXPERT, "n_group": 1,
        "n_routed_experts": EXPERTS, "n_shared_experts": SHARED, "num_attention_heads": HEADS,
        "num_experts_per_tok": TOP_K, "num_hidden_layers": LAYERS, "num_key_value_heads": HEADS,
        "q_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "rm_head": False,
        "topk_group": 1, "topk_method": "greedy", "use_mla": False, "v_head_dim": 0,
        "vocab_size": rows, "torch_dtype": "float32",
    }  # fmt: skip
    width = {
        "sam_vit_b": {
            "width": SAM, "layers": SAM_LAYERS, "heads": SAM_HEADS, "prompt_embed_dim": NECK,
            "global_attn_indexes": [], "downsample_channels": [CONVOLUTION, CLIP],
        },
        "clip-l-14-224": {
            "width": CLIP, "layers": CLIP_LAYERS, "heads": CLIP_HEADS,
            "image_size": 14 * CELLS, "patch_size": 14,
        },
    }  # fmt: skip
    projector = {"input_dim": 2 * CLIP, "n_embed": HIDDEN}
    files = {
        "config.json": {
            "architectures": [ARCHITECTURE],
            "model_type": "deepseek_vl_v2",
            "candidate_resolutions": [[1024, 1024]],
            "global_view_pos": "head",
            "tile_tag": "2D",
            "projector_config": {
                **projector, "model_type": "mlp_projector", "projector_type": "linear",
            },
            "vision_config": {
                "image_size": 1024, "mlp_ratio": 3.7362, "model_name": TOWER,
                "model_type": "vision", "width": width,
            },
            "language_config": language,
            **language,
        },
        "processor_config.json": {
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "normalize": True, "patch_size": 16,
            "image_token": "<image>", "pad_token": PAD, "image_mode": "tiny",
            "processor_class": "DeepseekVLV2Processor", "sft_format": "deepseek",
        },
        "tokenizer_config.json": {
            "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": True,
            "add_eos_token": False, "model_max_length": MAX_LENGTH,
            "tokenizer_class": "LlamaTokenizerFast", "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip
    # Of CLIP's own patches, which SAM's features stand in for; no module uses it.
    unused = {"model.vision_model.embeddings.patch_embedding.weight": torch.zeros(CLIP, 3, 14, 14)}
    save_file(unused, folder / "model.safetensors", {"format": "pt"})
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", "utf-8")


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and DeepSeek-OCR's special tokens."""
    special = [AddedToken(name, normalized=False, special=True) for name in (BOS, EOS, PAD)]
    names = [token.content for token in special] + sorted(pre.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    more = [AddedToken(name, normalized=False, special=True) for name in OTHERS]
    tokenizer.add_special_tokens([*special, *more])
    return tokenizer


if __name__ == "__main__":
    main()
