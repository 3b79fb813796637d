"""DeepSeek-VL2: views -> SigLIP -> projector -> image tokens among those of the text -> LLM.

The views of an image are the global view, and tiles of the same size that together are a larger
version of the image:

    global view       separator    2 x 1 tiles as one grid
    t t t newline     s            t t t t t t newline
    t t t newline                  t t t t t t newline
    t t t newline                  t t t t t t newline
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vlft.models.cache_name import CACHE
from vlft.models.deepseek_vl2.configuration import DeepseekVL2Config
from vlft.models.deepseek_vl2.text import DeepseekVL2TextModel

if TYPE_CHECKING:
    from collections.abc import Sequence


class Projector(nn.Module):
    """Squares of patches -> one token each: concatenated, then linear layers with GELU between."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ratio = config.downsample_ratio
        mlp_width = config.text_config.hidden_size * config.projector_mlp_ratio
        layers: list[nn.Module] = []
        width = config.vision_config.hidden_size * self.ratio**2
        for _ in range(config.projector_depth - 1):
            layers += [nn.Linear(width, mlp_width), nn.GELU()]
            width = mlp_width
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.text_config.hidden_size))

    def forward(self, features: Tensor) -> Tensor:
        """(V, side * side, W) patches of V views -> (V, h * h, D), h = ceil(side / ratio)."""
        side = round(features.shape[1] ** 0.5)
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        missing = -side % self.ratio
        grid = F.pad(grid, (0, missing, 0, missing))
        squares = F.unfold(grid, kernel_size=self.ratio, stride=self.ratio)
        tokens: Tensor = self.layers(squares.transpose(1, 2))
        return tokens


class DeepseekVL2PreTrainedModel(PreTrainedModel):
    """Class attributes that transformers requires of a model."""

    config: Any
    config_class = DeepseekVL2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012 (transformers' form)
    _no_split_modules = ["DecoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would search this file for its decorator, and not find it

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekVL2Model):
            std = self.config.text_config.hidden_size**-0.5
            nn.init.normal_(module.image_newline, std=std)
            nn.init.normal_(module.view_separator, std=std)


class DeepseekVL2Model(DeepseekVL2PreTrainedModel):
    """Tower, projector and LLM, without the vocabulary projection."""

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.projector = Projector(config)
        self.image_newline = nn.Parameter(torch.empty(text.hidden_size))
        self.view_separator = nn.Parameter(torch.empty(text.hidden_size))
        self.language_model = DeepseekVL2TextModel._from_config(text)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, tiles: Tensor) -> Tensor:
        """(R, D) features of the image tokens of I images, end to end.

        Args:
            pixel_values: (V, 3, H, W), for each image the global view, then its tiles row by row.
            tiles: (I, 2) int64, tiles (across, down) of each image.
        """
        features = self.vision_model(pixel_values).last_hidden_state
        return self.arrange(self.projector(features), tiles.tolist())

    def arrange(self, views: Tensor, tiles: Sequence[Sequence[int]]) -> Tensor:
        """(V, h * h, D) tokens of the views of I images -> (R, D), with newlines and separators."""
        side = round(views.shape[1] ** 0.5)
        first = 0
        parts: list[Tensor] = []
        for across, down in tiles:
            global_view = views[first].unflatten(0, (side, side))
            local = views[first + 1 : first + 1 + across * down]
            grid = local.unflatten(0, (down, across)).unflatten(2, (side, side))
            local_grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)
            blocks = [self._with_newlines(global_view), self._with_newlines(local_grid)]
            if not self.config.global_view_first:
                blocks.reverse()
            parts += [blocks[0], self.view_separator.unsqueeze(0), blocks[1]]
            first += 1 + across * down
        return torch.cat(parts)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tiles: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **settings: Any,
    ) -> BaseModelOutputWithPast:
        """Last hidden states, (B, T, D); the arguments are those of the class below."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and tiles is not None and input_ids is not None:
            features = self.get_image_features(pixel_values, tiles).to(inputs_embeds)
            places = (input_ids == self.config.image_token_id).unsqueeze(-1)
            if int(places.sum()) != len(features):
                raise ValueError(f"{int(places.sum())} image tokens, {len(features)} features")
            inputs_embeds = inputs_embeds.masked_scatter(places, features)
        output: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, **settings
        )
        return output

    def _with_newlines(self, grid: Tensor) -> Tensor:
        """(h, w, D) tokens -> (h * (w + 1), D), a newline after each row."""
        newline = self.image_newline.expand(grid.shape[0], 1, -1)
        return torch.cat([grid, newline], dim=1).flatten(0, 1)


class DeepseekVL2ForConditionalGeneration(DeepseekVL2PreTrainedModel, GenerationMixin):
    """DeepSeek-VL2 with its vocabulary projection: images and text in, text out."""

    _tied_weights_keys = {  # noqa: RUF012 (transformers' name and form)
        "lm_head.weight": "model.language_model.embed_tokens.weight"
    }

    def __init__(self, config: DeepseekVL2Config) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.model = DeepseekVL2Model(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tiles: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **settings: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, (B, T, V), in transformers' output class.

        pixel_values (V, 3, H, W) and tiles (I, 2) hold all images in order, see get_image_features.
        Logits are computed for the ``logits_to_keep`` last positions, all if 0. The other arguments
        are those of transformers' causal LLMs; ``settings``, with the cache, reach the LLM.
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            tiles=tiles,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **settings,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: getattr(output, CACHE)})

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Inputs of the next step; images are given with the prompt only.

        ``generate`` takes a cache only if it finds its name here or in ``forward``, see CACHE.
        """
        cache = past_key_values if cache is None else cache
        kwargs[CACHE] = cache
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if cache is not None and cache.get_seq_length():
            inputs["pixel_values"] = inputs["tiles"] = None
        return inputs
