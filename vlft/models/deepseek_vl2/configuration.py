"""Settings of DeepSeek-VL2."""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV2Config, PreTrainedConfig, SiglipVisionConfig


class DeepseekVL2TextConfig(DeepseekV2Config):
    """The LLM: DeepSeek-V2 with a choice of attention and routing.

    Attributes:
        use_mla: latent attention; else multi-head attention as in Llama.
        scoring_func: of the router: softmax or sigmoid.
        topk_method: greedy, group_limited_greedy or noaux_tc.
    """

    model_type = "deepseek_vl2_text"
    base_config_key = "text_config"

    use_mla: bool = True
    scoring_func: str = "softmax"

    def __post_init__(self, **kwargs: Any) -> None:
        """Derives the size of a head, which rotary embeddings and caches go by."""
        super().__post_init__(**kwargs)
        if not self.use_mla:
            self.head_dim = self.hidden_size // self.num_attention_heads
            # Its presence tells shared code that keys and values differ in size.
            del self.qk_head_dim


class DeepseekVL2Config(PreTrainedConfig):
    """The whole model.

    Attributes:
        vision_config: SiglipVisionConfig.
        text_config: DeepseekVL2TextConfig.
        image_token_id: stands where image features go.
        downsample_ratio: side of the square of patches that becomes one token.
        projector_depth: linear layers of the projector.
        projector_mlp_ratio: width of its hidden layers over the LLM's.
        global_view_first: whether the whole image comes before its tiles.
    """

    model_type = "deepseek_vl2"
    sub_configs_defaults = {  # noqa: RUF012 (transformers' name and form)
        "vision_config": SiglipVisionConfig,
        "text_config": DeepseekVL2TextConfig,
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 128815
    downsample_ratio: int = 2
    projector_depth: int = 2
    projector_mlp_ratio: int = 1
    global_view_first: bool = True
    tie_word_embeddings: bool = False
