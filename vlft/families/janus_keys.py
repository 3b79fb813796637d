"""The tensor names of Janus in both layouts."""

from __future__ import annotations

from vlft.families import siglip
from vlft.families.keymap import KeyMap, KeyRule
from vlft.families.multi_modality import LLAMA_KEYS

# Largest number of linear layers in an aligner; published ones have two.
DEEPEST_ALIGNER = 8


def _aligner_rules(original: str, native: str) -> list[KeyRule]:
    """The original numbers its GELUs too, so that its linear layers have even numbers."""
    names = ["fc1", *(f"hidden_layers.{number}" for number in range(DEEPEST_ALIGNER - 1))]
    return [
        KeyRule(f"{original}.layers.{2 * number}.{{p}}", (f"{native}.{name}.{{p}}",))
        for number, name in enumerate(names)
    ]


def _coder_rules(original: str, native: str, levels: str) -> list[KeyRule]:
    """Encoder or decoder of the VQ model; ``levels`` is down or up."""
    blocks, level = f"{original}.conv_blocks.{{i}}", f"{native}.{levels}.{{i}}"
    middle = (("0", "block_1"), ("1", "attn_1"), ("2", "block_2"))
    return [
        KeyRule(f"{blocks}.res.{{rest}}", (f"{level}.block.{{rest}}",)),
        KeyRule(f"{blocks}.{{rest}}", (f"{level}.{{rest}}",)),
        *(
            KeyRule(f"{original}.mid.{number}.{{rest}}", (f"{native}.mid.{name}.{{rest}}",))
            for number, name in middle
        ),
        KeyRule(f"{original}.{{leaf}}.{{p}}", (f"{native}.{{leaf}}.{{p}}",)),
    ]


KEYS = KeyMap(
    [
        *siglip.key_rules(
            "vision_model.vision_tower", "model.vision_model", attention_output="projection_layer"
        ),
        *_aligner_rules("aligner", "model.aligner"),
        *_aligner_rules("gen_aligner", "model.generation_aligner"),
        *_coder_rules("gen_vision_model.encoder", "model.vqmodel.encoder", "down"),
        *_coder_rules("gen_vision_model.decoder", "model.vqmodel.decoder", "up"),
        KeyRule("gen_vision_model.{rest}", ("model.vqmodel.{rest}",)),
        KeyRule("gen_embed.{p}", ("model.generation_embeddings.{p}",)),
        KeyRule("gen_head.output_mlp_projector.{p}", ("model.generation_head.proj_out.{p}",)),
        KeyRule("gen_head.vision_head.{p}", ("model.generation_head.vision_head.{p}",)),
        *LLAMA_KEYS,
    ],
    unused=[
        "vision_model.vision_tower.attn_pool.{rest}",
        "gen_vision_model.quantize.codebook_used",
    ],
)
