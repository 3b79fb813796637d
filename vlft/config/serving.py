"""Settings of vlft serve and vlft app."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlft.config.inference import LOWEST_TEMPERATURE
from vlft.config.shared import (
    ATTENTION,
    DEVICES,
    DTYPES,
    EXIF,
    HUBS,
    QUANTIZE,
    hub_rules,
    image_mode_setting,
    makers,
    max_image_tokens_setting,
    max_tiles_setting,
    special_tokens_setting,
)
from vlft.settings import Rule, Settings, given

if TYPE_CHECKING:
    from collections.abc import Sequence

# Of the key in the place of --api-key, which other users of the machine can see in its list of
# processes.
KEY_VARIABLE = "VLFT_API_KEY"

_model, _data, _serving, _generation = makers("Model", "Data", "Serving", "Generation")


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class ServeConfig(Settings):
    """Settings of ``vlft serve``, and of ``vlft app``."""

    ckpt_dir: tuple[str, ...] = _model(
        (), "Run folder of vlft sft, or a checkpoint-N in it; NAME=PATH names the model that "
        "clients ask for. Repeatable, for adapters of one base.", path=True)
    model: str | None = _model(None, "Base model of the adapters, or a model to serve without one.",
                               path=True, default_text="the checkpoint's")
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)
    dtype: str = _model("auto", "Data type of the weights. auto: as in training.", choices=DTYPES)
    device: str = _model("auto", "Device to run on.", choices=DEVICES)
    quantize: str | None = _model(
        None, "Store the LLM in 4 or 8 bit.", choices=QUANTIZE, default_text="as in training")
    attn: str = _model("auto", "Attention implementation.", choices=ATTENTION)
    accept_changes: bool = _model(False, "Use adapters although the model has other weights than "
                                  "their base.")

    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    exif: str | None = _data(None, "Turn images as their EXIF orientation says.", choices=EXIF,
                             default_text="as in training")
    image_mode: str | None = image_mode_setting("as in training")
    max_tiles: int | None = max_tiles_setting("as in training")
    max_image_tokens: int | None = max_image_tokens_setting("as in training")
    special_tokens: str | None = special_tokens_setting(None)

    max_new_tokens: int | None = _generation(
        None, "Longest reply, in tokens, to requests without max_tokens.", minimum=1,
        default_text="512; 8192 for DeepSeek-OCR; 32768 for Unlimited-OCR")
    temperature: float = _generation(
        0.0, "Of requests without one. 0 decodes greedily, above 0 samples.", minimum=0)
    repetition_penalty: float = _generation(
        1.0, "Above 1 makes repeated tokens less likely.", minimum=0.01, maximum=100)
    no_repeat_ngram: int | None = _generation(
        None, "Ban tokens that would repeat so many tokens, prompt included; 0 bans none.",
        minimum=0, maximum=1000, default_text="20 for DeepSeek-OCR, 35 for "
        "Unlimited-OCR, else 0")
    ngram_window: int | None = _generation(
        None, "Ban repetitions within so many last tokens of the reply alone.", minimum=1,
        default_text="128 for Unlimited-OCR, else all")
    batch_size: int = _generation(8, "Requests answered together.", minimum=1)
    prefill_chunk: int | None = _generation(
        None, "Tokens of prompts that run at once; fewer take less memory, replies are the same.",
        minimum=1, default_text="2048 on the CPU, 8192 on a GPU")

    host: str = _serving("127.0.0.1", "Address to listen on; one that other machines reach needs "
                         "--api-key.")
    port: int = _serving(8000, "Port; 0 for any that is free.", minimum=0, maximum=65535)
    api_key: str | None = _serving(
        None, f"Key that requests must have; the variable {KEY_VARIABLE} keeps it out of the list "
        "of processes.", default_text="none")
    max_request_mb: int = _serving(32, "Largest request, in megabytes.", minimum=1, maximum=1000)
    max_images: int = _serving(16, "Most images of a request.", minimum=0, maximum=1000)
    max_image_pixels: int = _serving(
        64_000_000, "Most pixels of an image.", minimum=1, maximum=178_956_970)
    max_queue: int = _serving(64, "Most requests that wait; others get the answer 429.", minimum=1)
    stop_timeout: int = _serving(
        30, "Seconds in which requests may end after SIGTERM or Ctrl-C.", minimum=0)

    @property
    def key(self) -> str:
        """The key that requests must have; empty for none."""
        return self.api_key or os.environ.get(KEY_VARIABLE, "")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        wrong_key = self.key and not (self.key.isascii() and self.key.isprintable()
                                      and " " not in self.key)
        return (
            (0 < self.temperature < LOWEST_TEMPERATURE, "--temperature",
             f"found {self.temperature:g}, 0 (greedy) or at least {LOWEST_TEMPERATURE:g} is "
             "allowed", "use 0 for the likeliest token"),
            (self.no_repeat_ngram == 0, given(self, "ngram_window"),
             "--no-repeat-ngram is 0", None),
            (self.api_key == "", "--api-key", "found an empty key", "leave it out for none"),
            (wrong_key, f"--api-key or {KEY_VARIABLE}",
             "holds a space or what is not ASCII, which no header can carry", "choose another key"),
            (not self.is_local and not self.key, "--api-key",
             f"--host {self.host} is reached by other machines, and requests need no key",
             f"add --api-key, or set {KEY_VARIABLE}"),
            (not self.ckpt_dir and given(self, "accept_changes"), "--accept-changes",
             "needs an adapter", "add --ckpt-dir"),
            *hub_rules(self, self.model),
        )
# fmt: on
