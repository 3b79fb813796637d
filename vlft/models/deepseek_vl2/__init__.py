"""DeepSeek-VL2 (https://arxiv.org/abs/2412.10302) on transformers' towers and decoder layers."""

from vlft.models.deepseek_vl2.configuration import DeepseekVL2Config, DeepseekVL2TextConfig
from vlft.models.deepseek_vl2.modeling import DeepseekVL2ForConditionalGeneration

__all__ = ["DeepseekVL2Config", "DeepseekVL2ForConditionalGeneration", "DeepseekVL2TextConfig"]
