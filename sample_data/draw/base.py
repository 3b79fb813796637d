"""Makes the tiny base of this folder as far as its VQ model: a Janus in the authors' layout.

    python sample_data/draw/base.py OUT_DIR --steps 1000

The VQ model learns to encode and decode images of all shapes and colours (shapes.py), which takes
about ten minutes of one thread. Everything else has random weights; recipe.sh trains the LLM then.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from shapes import COLOURS, SHAPES, UNNAMED, WORDINGS, draw, random_figure
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration

from vlft.checkpoints.export import export_model
from vlft.checkpoints.locate import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGE_SIZE, PATCH_SIZE = 32, 4  # 8 x 8 tokens of an image that is seen, and codes of one drawn
TOWER, TOWER_LAYERS = 32, 1
HIDDEN, MLP, LAYERS, HEADS = 64, 160, 3, 4
CODES, CODE_WIDTH = 128, 8
CHANNELS, LEVELS = 32, 3  # of the VQ model; the authors' class has at least 32 channels
VOCABULARY, MAX_LENGTH = 320, 512
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
OTHERS = ("<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>")

BATCH, PEAK, WARM_UP = 16, 2e-3, 50
COMMITMENT = 0.25  # weight of the distance of the encoder's output to its code
REVIVE = 40  # steps after which codes that no image used are set anew


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description="Make the tiny Janus with a trained VQ model.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    skeleton = options.out_dir / "skeleton"
    write_small_files(skeleton)
    base = describe(skeleton)
    torch.manual_seed(0)
    model: Any = JanusForConditionalGeneration(JanusConfig(**base.native_config()))
    initialise(model)
    train(model.model.vqmodel, options.steps)
    with torch.no_grad():
        # The LLM reads a code as the decoder does.
        book = F.normalize(model.model.vqmodel.quantize.embedding.weight, dim=1)
        model.model.generation_embeddings.weight.copy_(book)
    trained = options.out_dir / "untrained"
    trained.mkdir()
    export_model(model, base, trained, layout="original", dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, in {trained}")


def train(vq: Any, steps: int) -> None:
    """Trains encoder, codebook and decoder to give images back."""
    vq.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(vq.parameters(), PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    book = vq.quantize.embedding.weight
    used = torch.zeros(CODES)
    started = time.perf_counter()
    for step in range(steps):
        course = (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK * (0.01 + 0.99 * course) * min(1, (step + 1) / WARM_UP)
        pixels = images(range(step * BATCH, (step + 1) * BATCH))
        latent = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)  # (B, 8, 8, 8)
        codes = nearest(latent, book)
        used += torch.bincount(codes.flatten(), minlength=CODES)
        chosen = F.normalize(F.embedding(codes, book), dim=-1).permute(0, 3, 1, 2)
        straight = latent + (chosen - latent).detach()
        found = vq.decoder(vq.post_quant_conv(straight))
        distance = F.mse_loss(chosen, latent.detach())
        distance = distance + COMMITMENT * F.mse_loss(latent, chosen.detach())
        error = F.mse_loss(found, pixels)
        optimizer.zero_grad()
        (error + F.l1_loss(found, pixels) + CODE_WIDTH * distance).backward()
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % REVIVE == 0:
            if step < steps // 2:
                revive(book, latent, used == 0)
            seconds, count = time.perf_counter() - started, int((used > 0).sum())
            decibel = 10 * math.log10(4 / error.item())
            print(f"{step + 1:5} {seconds:5.0f} s {decibel:.1f} dB {count} codes used", flush=True)
            used.zero_()


def nearest(latent: Tensor, book: Tensor) -> Tensor:
    """(B, H, W) codes of the largest cosine for (B, E, H, W) normalised vectors."""
    return (latent.detach().permute(0, 2, 3, 1) @ F.normalize(book.detach(), dim=1).T).argmax(-1)


@torch.no_grad()
def revive(book: Tensor, latent: Tensor, dead: Tensor) -> None:
    """Sets codes that no image used to vectors of the newest images."""
    rows = latent.permute(0, 2, 3, 1).flatten(0, 2)
    book[dead] = rows[torch.randint(len(rows), (int(dead.sum()),))]


def images(numbers: Sequence[int]) -> Tensor:
    """(B, 3, 32, 32) pixels from -1 to 1 of random shapes."""
    made = []
    for number in numbers:
        rng = random.Random(f"vq {number}")
        figure = random_figure(rng, rng.choice(list(COLOURS)), rng.choice(SHAPES))
        made.append(np.asarray(draw(figure), np.float32))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2) / 127.5 - 1


def initialise(model: nn.Module) -> None:
    """Random weights that keep the variance of a layer's input."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                gain = 0.4 if name.endswith(("o_proj", "down_proj", "conv2")) else 1.0
                module.weight.normal_(std=gain * module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.3)


def write_small_files(folder: Path) -> None:
    """Configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))

    def module(cls: str, kind: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": kind, "params": params}

    def aligner(kind: str, width: int) -> dict[str, Any]:
        sizes = {"depth": 2, "input_dim": width, "n_embed": HIDDEN}
        return module("MlpProjector", kind, projector_type="mlp_gelu", **sizes)

    vq = {
        "image_token_size": CODES, "n_embed": CODE_WIDTH, "ch": CHANNELS,
        "ch_mult": [1] * LEVELS, "z_channels": CHANNELS, "num_res_blocks": 1,
    }  # fmt: skip
    tower = {
        "image_size": IMAGE_SIZE, "model_name": "siglip_large_patch16_384",
        "select_feature": "same", "select_layer": -1, "width": TOWER, "layers": TOWER_LAYERS,
        "heads": 2, "mlp_ratio": 2.0, "patch_size": PATCH_SIZE,
    }  # fmt: skip
    head = {"image_token_embed": HIDDEN, "image_token_size": CODES, "n_embed": HIDDEN}
    language = {
        "hidden_size": HIDDEN, "intermediate_size": MLP, "max_position_embeddings": MAX_LENGTH,
        "model_type": "llama", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS, "torch_dtype": "float32", "vocab_size": VOCABULARY,
    }  # fmt: skip
    files = {
        "config.json": {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "torch_dtype": "float32",
            # That of Janus-1.3B: its chat text names the roles in words.
            "transformers_version": "4.38.2",
            "aligner_config": aligner("aligner", TOWER),
            "gen_aligner_config": aligner("gen_aligner", CODE_WIDTH),
            "gen_head_config": module("vision_head", "gen_head", **head),
            "gen_vision_config": module("VQ-16", "gen_vision", **vq),
            "language_config": language,
            "vision_config": module("CLIPVisionTower", "vision", **tower),
        },
        "preprocessor_config.json": {
            "background_color": [127] * 3, "do_normalize": True, "image_mean": [0.5] * 3,
            "image_processor_type": "VLMImageProcessor", "image_size": IMAGE_SIZE,
            "image_std": [0.5] * 3, "min_size": 14, "processor_class": "VLChatProcessor",
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "add_special_token": False, "ignore_id": -100, "image_tag": "<image_placeholder>",
            "mask_prompt": True, "num_image_tokens": (IMAGE_SIZE // PATCH_SIZE) ** 2,
            "processor_class": "VLChatProcessor", "sft_format": "deepseek",
        },
        "tokenizer_config.json": {
            "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "add_bos_token": True,
            "add_eos_token": False, "model_max_length": MAX_LENGTH,
            "tokenizer_class": "LlamaTokenizerFast", "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip
    # The export asks for tensors that no module uses, of which there are none.
    save_file({}, folder / "model.safetensors", {"format": "pt"})
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", "utf-8")


def word_tokenizer() -> Tokenizer:
    """A token for each word of the prompts and each byte, and Janus' special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(name, normalized=False, special=True) for name in (BOS, EOS, PAD, *OTHERS)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    names = [UNNAMED, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)]
    texts = [f"User: {words.format(name)}\n\nAssistant:" for words in WORDINGS for name in names]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


if __name__ == "__main__":
    main()
