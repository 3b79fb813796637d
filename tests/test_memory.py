"""Running out of memory is one message with what to lower, wherever it happens."""

from __future__ import annotations

import pytest
import torch
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl

import vlft
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.tuned import open_tuned
from vlft.errors import VlftError
from vlft.inference import model as infer_model


def full(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    home = tmp_path_factory.mktemp("memory")
    return vlft.SftConfig(
        model=str(SIGLIP.folder), dataset=(str(write_jsonl(home / "t.jsonl", make_rows(6))),),
        image_root=GOLDEN / "images", val_ratio=0.0, output_dir=home / "output", max_steps=1,
        batch_size=6, show_sample=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(settings):
    return vlft.sft(settings).checkpoint


PLACES = {
    "vlft.checkpoints.load._place": ("while the model is loaded", "--quantize nf4"),
    "vlft.vision.batches.encode_batch": ("images are encoded", "--quantize nf4"),
    "vlft.training.loop.row_loss": (r"with a row of \d+ tokens", "--tokens-per-microbatch"),
    "vlft.training.backend.Backend.step": (r"with a row of \d+ tokens", "--tokens-per-microbatch"),
}


@pytest.mark.parametrize("place", PLACES)
def test_training(settings, monkeypatch, tmp_path, place):
    message, remedy = PLACES[place]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(place, full)
    with pytest.raises(VlftError, match=f"cpu: out of memory.*{message}") as caught:
        vlft.sft(settings)
    assert remedy in caught.value.hint


def test_answering(checkpoint, settings, monkeypatch):
    config = vlft.InferConfig(
        ckpt_dir=checkpoint, dataset=settings.dataset, image_root=settings.image_root
    )
    monkeypatch.setattr("transformers.generation.utils.GenerationMixin.generate", full)
    with pytest.raises(VlftError, match="out of memory while replies are generated") as caught:
        vlft.infer(config)
    assert "--batch-size" in caught.value.hint


def test_merging(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("vlft.checkpoints.merge.put_into", full)
    with pytest.raises(VlftError, match="out of memory while merging") as caught:
        vlft.merge_lora(vlft.MergeLoraConfig(ckpt_dir=checkpoint, output_dir=tmp_path / "merged"))
    assert "--device cpu" in caught.value.hint
    assert not (tmp_path / "merged").exists()


def test_other_errors_stay_as_they_are(settings, monkeypatch):
    def wrong(*_args, **_kwargs):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("vlft.training.loop.row_loss", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        vlft.sft(settings)


def test_only_the_merged_model_in_16_bit_reaches_the_gpu(checkpoint, monkeypatch):
    """The adapter is merged in float32 on the CPU; ``meta`` stands for a GPU."""
    loaded = []
    original = infer_model.load_full_precision

    def load(tuned, placement, base):
        loaded.append((placement.device.type, placement.dtype))
        return original(tuned, placement, base)

    monkeypatch.setattr(infer_model, "load_full_precision", load)
    config = vlft.InferConfig(ckpt_dir=checkpoint, merge_lora=True)
    placement = Placement(torch.device("meta"), torch.bfloat16)
    model = infer_model.load_for_inference(
        config, describe(SIGLIP.folder), open_tuned(checkpoint), placement
    )
    assert loaded == [("cpu", torch.float32)]
    held = {(p.device.type, p.dtype) for p in model.parameters()}
    assert held == {("meta", torch.bfloat16)}
