"""Settings of vlft draw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.shared import ATTENTION, DEVICES, DTYPES, HUBS, QUANTIZE, hub_rules, makers
from vlft.settings import Rule, Settings, changed, given

if TYPE_CHECKING:
    from collections.abc import Sequence

_model, _data, _generation, _output = makers("Model", "Data", "Generation", "Output")


# A table: one or two lines for a setting.
# fmt: off
@dataclass(frozen=True, kw_only=True)
class DrawConfig(Settings):
    """Settings of ``vlft draw``."""

    ckpt_dir: Path | None = _model(None, "Run folder of vlft sft, or a checkpoint-N in it.")
    model: str | None = _model(None, "Base model of the adapter, or a model to draw without one.",
                               path=True, default_text="the checkpoint's")
    revision: str | None = _model(None, "Branch, tag or commit on the hub.")
    hub: str = _model("huggingface", "Hub that model ids refer to.", choices=HUBS)
    dtype: str = _model("auto", "Data type of the weights. auto: as in training.", choices=DTYPES)
    device: str = _model("auto", "Device to run on.", choices=DEVICES)
    quantize: str | None = _model(
        None, "Store the LLM in 4 or 8 bit.", choices=QUANTIZE, default_text="as in training")
    attn: str = _model("auto", "Attention implementation.", choices=ATTENTION)
    merge_lora: bool = _model(False, "Merge the adapter into the weights before the first image.")
    accept_changes: bool = _model(False, "Use the adapter although the model has other weights "
                                  "than its base.")

    prompt: tuple[str, ...] = _data((), "What to draw. Repeatable.")
    load_dataset_config: bool = _data(
        False, "Draw the validation set of the run in --ckpt-dir: its records whose reply is an "
        "image.")
    dataset: tuple[str, ...] = _data(
        (), "Draw the records of these files: their query, with the images that it shows. "
        "Repeatable.", path=True, records=True)
    reconstruct: tuple[str, ...] = _data(
        (), "Encode and decode these images instead, and tell how much their codes keep. "
        "Repeatable.", path=True)
    image_root: Path | None = _data(None, "Folder that image paths are relative to.",
                                    default_text="the data file's folder")
    confine_images: Path | None = _data(None, "The only folder that images are read from.",
                                        default_text="any")
    allow_private_urls: bool = _data(False, "Download images from addresses that are not public.")
    on_bad_sample: str = _data("error", "What to do with a bad record.", choices=("error", "skip"))

    num_images: int = _generation(1, "Images of each prompt.", minimum=1)
    cfg_weight: float = _generation(
        5.0, "Weight of classifier-free guidance: how much a prompt counts; 1 is no guidance.",
        minimum=0, maximum=1000)
    temperature: float = _generation(
        1.0, "0 takes the likeliest code each time, above 0 samples.", minimum=0, maximum=1000)
    batch_size: int = _generation(8, "Images drawn together.", minimum=1)
    seed: int = _generation(42, "Random seed of sampling.", minimum=0)

    output_dir: Path = _output(Path("images"), "Folder for the images (.png) and a sheet of them.")
    overwrite: bool = _output(False, "Replace images of other settings instead of refusing them.")

    def rules(self) -> Sequence[Rule]:
        """Settings that exclude or need each other; ``build`` has checked the single values."""
        needy = changed(self, "merge_lora", "accept_changes")
        records = given(self, "image_root", "confine_images", "allow_private_urls", "on_bad_sample")
        of_run, has_adapter = self.load_dataset_config, self.ckpt_dir is not None
        return (
            *_reconstruction_rules(self),
            (not (self.prompt or self.dataset or of_run or self.reconstruct), "vlft draw",
             "nothing to draw", "add e.g. --prompt 'a red square', or --dataset prompts.jsonl"),
            (self.prompt and self.dataset, "--prompt",
             "found together with --dataset; one of the two is allowed", "leave one of them out"),
            (of_run and (self.prompt or self.dataset), "--load-dataset-config",
             "found together with --prompt or --dataset; one of them is allowed",
             "leave one of them out"),
            (of_run and not has_adapter, "--load-dataset-config",
             "needs the run whose validation set it draws",
             "add --ckpt-dir output/.../checkpoint-N"),
            (of_run and self.on_bad_sample != "error", "--on-bad-sample",
             "found together with --load-dataset-config, which reads the data as the run did",
             "leave one of them out"),
            (self.prompt and records, records, "only for --dataset", "leave it out"),
            (self.merge_lora and self.quantize not in (None, "none"), "--quantize",
             f"found {self.quantize} with --merge-lora, which merges into whole weights",
             "leave one of them out"),
            (needy and not has_adapter, needy, "needs an adapter", "add --ckpt-dir"),
            *hub_rules(self, self.model),
        )


def _reconstruction_rules(config: DrawConfig) -> Sequence[Rule]:
    """Nothing is drawn."""
    drawing = given(config, "prompt", "load_dataset_config", "dataset", "image_root",
                    "confine_images", "allow_private_urls", "on_bad_sample", "num_images",
                    "cfg_weight", "temperature", "batch_size", "seed", "output_dir", "overwrite")
    return (
        (config.reconstruct and drawing, drawing, "found --reconstruct, which draws nothing",
         "leave one of them out"),
    )
