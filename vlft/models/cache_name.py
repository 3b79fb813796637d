"""The name that transformers has for keys and values."""

from __future__ import annotations

from transformers.modeling_outputs import CausalLMOutputWithPast

# Of the argument of a model and of the field of its output; transformers 5.24 renamed both.
CACHE = next(name for name in ("cache", "past_key_values") if hasattr(CausalLMOutputWithPast, name))
