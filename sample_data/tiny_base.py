"""Makes the untrained tiny base: a DeepSeek-VL checkpoint in the authors' layout.

    python sample_data/tiny_base.py OUT_DIR --seed 0

SigLIP tower, two-layer GELU aligner and Llama LLM with random weights, and a byte-level BPE
tokenizer that splits text as DeepSeek's does, trained on the questions of printed.py and on
english.txt.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from printed import make_records, make_scene
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre
from torch import Tensor, nn
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

from vlft.checkpoints.load import adapt_name
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import DTYPES
from vlft.families.deepseek_vl import FAMILY, SYSTEM_PROMPT

IMAGE_SIZE, PATCH_SIZE = 64, 16
TOWER_WIDTH, TOWER_LAYERS = 128, 4
HIDDEN, MLP, LAYERS, HEADS = 192, 512, 4, 6
VOCABULARY = 1000
ROWS = 1024  # rows of the embedding: the vocabulary, rounded up to a multiple of 64
MAX_LENGTH = 2048

# Gains of the random initialisation. Layers that end a residual branch are scaled by one over the
# root of the number of branches (GPT-2, section 2.3). Large image features and token embeddings
# helped a little: the loss of short runs fell sooner with a gain of 3 than of 1 for the aligner's
# linear2, and with a token standard deviation of 0.3 than of 0.02.
GAINS = {
    "out_proj": (2 * TOWER_LAYERS) ** -0.5,
    "fc2": (2 * TOWER_LAYERS) ** -0.5,
    "o_proj": (2 * LAYERS) ** -0.5,
    "down_proj": (2 * LAYERS) ** -0.5,
    "linear2": 3.0,
    "lm_head": 0.3,
}
POSITION_STD, TOKEN_STD = 0.2, 0.3

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"

# The splitting rules of DeepSeek's tokenizer.json.
LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ]+"
)
PUNCTUATION = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
CHINESE = r"[一-龥ࠀ-一가-퟿]+"
SPLITS = (r"[\r\n]", LETTERS, PUNCTUATION, r"\s+$", CHINESE)


def main() -> None:
    """Writes the model folder."""
    parser = argparse.ArgumentParser(description="Make the untrained tiny base.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    options = parser.parse_args()
    options.out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus(options.seed))
    tokenizer.save(str(options.out_dir / "tokenizer.json"))
    for name, content in settings(options.dtype).items():
        text = json.dumps(content, ensure_ascii=False, indent=2)
        (options.out_dir / name).write_text(text + "\n", "utf-8")
    config = describe(options.out_dir).native_config()
    model = DeepseekVLForConditionalGeneration(DeepseekVLConfig(**config))
    initialise(model, torch.Generator().manual_seed(options.seed))
    tensors = original_tensors(dict(model.named_parameters()), DTYPES[options.dtype])
    save_file(tensors, options.out_dir / "model.safetensors", {"format": "pt"})
    count = sum(tensor.numel() for tensor in tensors.values())
    prompt = len(tokenizer.encode(SYSTEM_PROMPT, add_special_tokens=False).ids)
    print(f"{count:,} parameters, system prompt of {prompt} tokens, in {options.out_dir}")


def corpus(seed: int) -> list[str]:
    """Texts in the form in which the base reads them, and some English."""
    rng = random.Random(f"tokenizer {seed}")
    texts = [SYSTEM_PROMPT + "\n\nUser: \n\nAssistant: "] * 200
    for _ in range(4000):
        for record in make_records(make_scene(rng), "", rng):
            for query, response in [
                *record.get("history", []),
                [record["query"], record["response"]],
            ]:
                # A question that follows an image has no space before it.
                texts += query.split("<image>")
                texts.append(f"User: \n\nAssistant: {response}")
    english = Path(__file__).resolve().parent / "english.txt"
    return [*texts, *english.read_text("utf-8").split("\n\n") * 5]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A tokenizer with DeepSeek's splitting rules and special tokens, trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            *(pre.Split(Regex(rule), "isolated") for rule in SPLITS),
            pre.Digits(individual_digits=True),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(BOS, normalized=True, special=True),
        AddedToken(EOS, normalized=True, special=True),
        AddedToken(PAD, normalized=False, special=True),
        AddedToken(FAMILY.image_tag, normalized=False, special=True),
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer


def settings(dtype: str) -> dict[str, dict[str, Any]]:
    """The contents of the folder's JSON files, by file name."""
    return {
        "config.json": {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "torch_dtype": dtype,
            "aligner_config": _aligner_config(),
            "language_config": _language_config(dtype),
            "vision_config": _vision_config(),
        },
        "preprocessor_config.json": {
            "background_color": [127, 127, 127],
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "VLMImageProcessor",
            "image_size": IMAGE_SIZE,
            "image_std": [0.5, 0.5, 0.5],
            "min_size": 14,
            "processor_class": "VLChatProcessor",
            "rescale_factor": 1 / 255,
        },
        "processor_config.json": {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": FAMILY.image_tag,
            "mask_prompt": True,
            "num_image_tokens": (IMAGE_SIZE // PATCH_SIZE) ** 2,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
        "special_tokens_map.json": _special_tokens(),
        "tokenizer_config.json": _tokenizer_config(),
    }


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Fills in random weights that keep a layer's input variance, times GAINS; biases are zero."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                std = GAINS.get(name.rpartition(".")[2], 1.0) * module.in_features**-0.5
                module.weight.normal_(std=std, generator=generator)
            elif isinstance(module, nn.Embedding):
                std = POSITION_STD if name.endswith("position_embedding") else TOKEN_STD
                module.weight.normal_(std=std, generator=generator)
            elif isinstance(module, nn.Conv2d):
                bound = (module.in_channels * PATCH_SIZE**2) ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                module.bias.zero_()


def original_tensors(native: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters of transformers' class under the authors' names."""
    tensors: dict[str, Tensor] = {}
    for name in native:
        name_in_file = name.replace("vision_model.vision_model", "vision_model")
        (match,) = FAMILY.keys.from_native(name_in_file)
        parts = [native[adapt_name(part, set(native))].detach() for part in match.native]
        tensors[match.original] = match.to_original(parts).to(dtype).contiguous()
    return dict(sorted(tensors.items()))


def _vision_config() -> dict[str, Any]:
    return {
        "cls": "CLIPVisionTower",
        "model_type": "vision",
        "params": {
            "image_size": IMAGE_SIZE,
            "model_name": "siglip_large_patch16_384",
            "select_feature": "same",
            "select_layer": -1,
            "width": TOWER_WIDTH,
            "layers": TOWER_LAYERS,
        },
    }


def _aligner_config() -> dict[str, Any]:
    return {
        "cls": "MlpProjector",
        "model_type": "aligner",
        "params": {
            "depth": 2,
            "input_dim": TOWER_WIDTH,
            "n_embed": HIDDEN,
            "projector_type": "mlp_gelu",
        },
    }


def _language_config(dtype: str) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "max_position_embeddings": MAX_LENGTH,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "torch_dtype": dtype,
        "vocab_size": ROWS,
    }


def _special_tokens() -> dict[str, Any]:
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    return {
        "additional_special_tokens": [FAMILY.image_tag],
        **{name: _token(content, content != PAD) for name, content in named.items()},
    }


def _token(content: str, normalized: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    return {"content": content, **flags}


def _tokenizer_config() -> dict[str, Any]:
    special = {
        name: {"__type": "AddedToken", **value} if isinstance(value, dict) else value
        for name, value in _special_tokens().items()
    }
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": MAX_LENGTH,
        "processor_class": "VLChatProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
        "use_default_system_prompt": False,
    }


if __name__ == "__main__":
    main()
