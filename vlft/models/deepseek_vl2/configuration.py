"""Configuration classes of DeepSeek-VL2."""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV2Config, PreTrainedConfig, SiglipVisionConfig


class DeepseekVL2TextConfig(DeepseekV2Config):
    """The LLM: DeepSeek-V2 with a choice of attention and routing, for which see ``Router``."""

    model_type = "deepseek_vl2_text"
    base_config_key = "text_config"

    use_mla: bool = True  # multi-head latent attention; else multi-head attention as in Llama
    scoring_func: str = "softmax"  # or sigmoid

    def __post_init__(self, **kwargs: Any) -> None:
        """Derives head_dim, which rotary embeddings and caches read."""
        super().__post_init__(**kwargs)
        if not self.use_mla:
            self.head_dim = self.hidden_size // self.num_attention_heads
            # Shared code takes its presence as a sign that heads of keys and values differ in size.
            del self.qk_head_dim


class DeepseekVL2Config(PreTrainedConfig):
    """The whole model."""

    model_type = "deepseek_vl2"
    sub_configs_defaults = {  # noqa: RUF012 (transformers' name and form)
        "vision_config": SiglipVisionConfig,
        "text_config": DeepseekVL2TextConfig,
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 128815
    downsample_ratio: int = 2  # side, in patches, of the square that becomes one token
    projector_depth: int = 2  # number of linear layers
    projector_mlp_ratio: int = 1  # width of its hidden layers over the LLM's hidden size
    global_view_first: bool = True  # before the tiles
    tie_word_embeddings: bool = False
