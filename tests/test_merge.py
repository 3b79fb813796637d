"""merge-lora gives the logits of base and adapter, in both layouts, or fails."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import weakref

import pytest
import torch
from conftest import GOLDEN, make_rows, only_siglip, without_ocr2, write_jsonl
from safetensors.torch import load_file, save_file
from tolerances import assert_close, assert_within

import vlft
from vlft import console
from vlft.checkpoints import merge, quantize
from vlft.checkpoints.locate import describe
from vlft.checkpoints.merge import merge_lora
from vlft.checkpoints.runs import find_checkpoint
from vlft.checkpoints.weights import count_numbers, merged_adapters, read_tensors
from vlft.errors import CheckpointError, UsageError, VerificationError

CHANGES = {
    "lora": {},
    "nf4": {"quantize": "nf4", "lora_target_modules": "ALL"},
    "parts": {"lora_target_modules": "ALL", "train_aligner": True, "train_vision": True},
    "dora": {"use_dora": True, "lora_target_modules": "ALL"},
    "pissa": {"init_lora_weights": "pissa"},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, case):
    """A function that gives a short run by name, trained at its first call."""
    home = tmp_path_factory.mktemp("merge")
    data = write_jsonl(home / "train.jsonl", make_rows(16, case))
    made = {}

    def get(name):
        if name not in made:
            config = vlft.SftConfig(
                model=str(case.folder), dataset=(str(data),), image_root=GOLDEN / "images",
                val_ratio=0.0, output_dir=home / name, max_steps=3, batch_size=8,
                learning_rate=1e-2, show_sample=False, **case.settings,
            )  # fmt: skip
            made[name] = vlft.sft(dataclasses.replace(config, **CHANGES[name])).run
        return made[name]

    return get


def config_of(run, target, **settings):
    return vlft.MergeLoraConfig(ckpt_dir=run, output_dir=target, **settings)


@pytest.fixture
def sample_inputs(processor):
    row = {"query": "<image>What is number 1?", "images": ["images/photo_b.jpg"]}
    batch = processor.collate([processor.encode(row, GOLDEN)])
    del batch["labels"]
    return batch


def logits(path, inputs, **load):
    model, _ = vlft.load(path, **load)
    with torch.no_grad():
        return model(**inputs).logits


@without_ocr2
@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_merged_is_unmerged(runs, case, sample_inputs, tmp_path, layout):
    if layout == "transformers" and not describe(case.folder).family.has_transformers_layout:
        pytest.skip("one layout")
    compare(runs("parts"), case, sample_inputs, tmp_path, layout)


@only_siglip
@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_merged_is_unmerged_in_other_ways(runs, case, sample_inputs, tmp_path, name):
    compare(runs(name), case, sample_inputs, tmp_path, "original")


def compare(run, case, sample_inputs, tmp_path, layout):
    result = merge_lora(config_of(run, tmp_path / "m", format=layout, dtype="float32"))
    assert_within(result.difference, "merged logits")
    assert describe(result.folder).layout == layout
    unmerged = logits(case.folder, sample_inputs, adapter=find_checkpoint(run))
    merged = logits(result.folder, sample_inputs)
    base = logits(case.folder, sample_inputs)
    assert_close(merged, unmerged, "merged logits")
    assert (merged - base).abs().max() > 1e-2


@without_ocr2
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_qlora_bases(runs, case, sample_inputs, tmp_path, base):
    run = runs("nf4")
    result = merge_lora(config_of(run, tmp_path / "m", base=base, dtype="float32"))
    quantised = logits(case.folder, sample_inputs, adapter=find_checkpoint(run), quantize="nf4")
    whole = logits(case.folder, sample_inputs, adapter=find_checkpoint(run))
    merged = logits(result.folder, sample_inputs)
    expected = quantised if base == "dequantized" else whole
    assert_close(merged, expected, "merged logits")


@without_ocr2
def test_the_files_are_those_of_the_base(runs, case, tmp_path):
    folder = merge_lora(config_of(runs("parts"), tmp_path / "m")).folder
    small = {p.name for p in case.folder.iterdir() if p.suffix == ".json" and "index" not in p.name}
    assert {p.name for p in folder.iterdir() if p.suffix == ".json"} == small
    before, after = dict(read_tensors(case.folder)), dict(read_tensors(folder))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    keys = describe(case.folder).family.keys
    kept = [name for name in before if keys.is_unused(name) or name.startswith("gen_")]
    assert kept
    assert all(torch.equal(before[name].float(), after[name].float()) for name in kept)
    changed = {n for n in before if not torch.equal(before[n].float(), after[n].float())}
    # Adapters exist for linear layers alone.
    assert changed
    assert not [n for n in changed if "norm" in n.split(".")[-2] or "embed_tokens" in n]


@only_siglip
def test_nothing_but_the_targets_changes(runs, case, tmp_path):
    folder = merge_lora(config_of(runs("lora"), tmp_path / "m")).folder
    before = load_file(case.folder / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name and "o_proj" not in name for name in changed)


@only_siglip
def test_dtype_follows_the_base_or_the_flag(runs, tmp_path):
    for name, dtype, expected in (
        ("lora", "auto", torch.float32),
        ("lora", "bfloat16", torch.bfloat16),
        ("bfloat16", "auto", torch.float32),
    ):
        folder = merge_lora(config_of(runs(name), tmp_path / f"{name}-{dtype}", dtype=dtype)).folder
        tensors = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {expected}
        stated = json.loads((folder / "config.json").read_text())["torch_dtype"]
        assert stated == str(expected).removeprefix("torch.")


@only_siglip
def test_a_folder_in_use_is_kept(runs, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="the output folder is in use"):
        merge_lora(config_of(runs("lora"), target))
    with pytest.raises(CheckpointError, match=r"holds mine\.txt, which vlft has not written"):
        merge_lora(config_of(runs("lora"), target, overwrite=True))
    assert (target / "mine.txt").read_text() == "mine"
    (target / "mine.txt").unlink()
    merge_lora(config_of(runs("lora"), target))
    (target / "model.safetensors").unlink()
    merge_lora(config_of(runs("lora"), target, overwrite=True))
    assert (target / "model.safetensors").exists()


@only_siglip
def test_a_wrong_result_is_not_a_success(runs, tmp_path, monkeypatch):
    original = merge.export_model

    def broken(model, *args, **settings):
        model.lm_head.weight.data[0] += 1.0
        original(model, *args, **settings)

    monkeypatch.setattr(merge, "export_model", broken)
    with pytest.raises(VerificationError, match="logits differ by"):
        merge_lora(config_of(runs("lora"), tmp_path / "m"))
    assert not (tmp_path / "m").exists()


@only_siglip
@pytest.mark.parametrize("broken", ["adapter", "base"])
def test_scores_that_are_no_numbers(runs, tmp_path, broken):
    """Weights may be numbers, and so large that what is computed with them is not."""
    base, adapter = (shutil.copytree(path, tmp_path / name) for path, name in (
        (GOLDEN / "checkpoints" / "deepseek-vl-siglip", "base"),
        (find_checkpoint(runs("lora")), "adapter"),
    ))  # fmt: skip
    file = (
        adapter / "adapter_model.safetensors" if broken == "adapter" else base / "model.safetensors"
    )
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.self_attn.v_proj" in name)
    tensors[name].fill_(3e38)
    save_file(tensors, file, {"format": "pt"})
    config = config_of(adapter, tmp_path / "m", model=str(base), accept_changes=True)
    with pytest.raises(CheckpointError, match="its scores are no numbers") as error:
        merge_lora(config)
    place = "adapter_model.safetensors: with this adapter" if broken == "adapter" else "base: its"
    assert place in str(error.value)
    assert not (tmp_path / "m").exists()


@only_siglip
def test_a_full_run_has_nothing_to_merge(case, tmp_path):
    run = vlft.sft(
        vlft.SftConfig(
            model=str(case.folder),
            dataset=(str(write_jsonl(tmp_path / "t.jsonl", make_rows(8))),),
            image_root=GOLDEN / "images", val_ratio=0.0, output_dir=tmp_path / "o", max_steps=1,
            tuner="full", show_sample=False,
        )
    ).run  # fmt: skip
    with pytest.raises(CheckpointError, match="there is nothing to merge"):
        merge_lora(config_of(run, tmp_path / "m"))
    # Its checkpoint is a whole model.
    assert describe(find_checkpoint(run)).layout == "original"


@only_siglip
def test_it_replaces_neither_its_base_nor_its_adapter(runs, case, monkeypatch):
    run = runs("lora")
    for target in (run, run.parent, find_checkpoint(run), case.folder, case.folder.parent):
        with pytest.raises(UsageError, match=r"would replace|in use"):
            merge_lora(config_of(run, target, overwrite=True))
    assert find_checkpoint(run).exists()


@only_siglip
@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_get_the_rights_of_the_umask(runs, case, tmp_path, monkeypatch, umask, rights):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old = os.umask(umask)
    try:
        merge_lora(config_of(runs("lora"), tmp_path / "m"))
        made = vlft.convert(
            vlft.ConvertConfig(src=str(case.folder), dst=tmp_path / "c", format="transformers")
        )
        data = write_jsonl(tmp_path / "train.jsonl", make_rows(6))
        vlft.sft(
            vlft.SftConfig(
                model=str(made), dataset=(str(data),), image_root=GOLDEN / "images", val_ratio=0.0,
                output_dir=tmp_path / "r", max_steps=1, vision_cache="disk", show_sample=False,
            )
        )  # fmt: skip
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.name for path in files}
    written = {"unused.safetensors", "adapter_model.safetensors", "state.safetensors"}
    assert written < kinds
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "cache").rglob("*"))
    wrong = {path.name for path in files if stat.S_IMODE(path.stat().st_mode) != rights}
    assert not wrong


@only_siglip
class TestOtherBases:
    def infer(self, run, model, tmp_path, **settings):
        (tmp_path / "q.jsonl").write_text('{"query": "Hello."}\n')
        config = vlft.InferConfig(
            ckpt_dir=run, model=str(model), dataset=(str(tmp_path / "q.jsonl"),), max_new_tokens=2,
            output=tmp_path / "out.jsonl", show_samples=0, **settings,
        )  # fmt: skip
        return vlft.infer(config)

    def check(self, run, model, tmp_path, found):
        """It is refused by both commands, unless it is accepted."""
        with pytest.raises(CheckpointError, match=rf"{found}(.|\n)*--accept-changes"):
            merge_lora(config_of(run, tmp_path / "no", model=str(model)))
        with pytest.raises(CheckpointError, match=found):
            self.infer(run, model, tmp_path)
        assert not (tmp_path / "no").exists()
        accepted = {"model": str(model), "accept_changes": True}
        assert merge_lora(config_of(run, tmp_path / "yes", **accepted)).folder.is_dir()
        assert self.infer(run, model, tmp_path, accept_changes=True).rows

    @pytest.mark.parametrize("ours", [True, False])
    def test_a_second_merge(self, runs, tmp_path, ours):
        """It is noticed with adapters of others too, which do not say what their base was."""
        adapter = tmp_path / "adapter"
        shutil.copytree(find_checkpoint(runs("lora")), adapter)
        if not ours:
            path = adapter / "adapter_model.safetensors"
            save_file(load_file(path), path)
        once = merge_lora(config_of(adapter, tmp_path / "m1", format="transformers")).folder
        self.check(adapter, once, tmp_path, "m1: holds this adapter already")
        (tmp_path / "moved").mkdir()
        moved = vlft.convert(vlft.ConvertConfig(src=str(once), dst=tmp_path / "moved"))
        self.check(adapter, moved, tmp_path / "moved", "moved: holds this adapter already")

    @pytest.mark.parametrize("what", ["all", "one"])
    def test_weights_of_the_same_sizes(self, runs, case, tmp_path, what, capfd):
        other = tmp_path / "other"
        shutil.copytree(case.folder, other)
        weights = load_file(other / "model.safetensors")
        name = "language_model.model.layers.0.self_attn.v_proj.weight"
        for key in weights if what == "all" else [name]:
            weights[key][..., 0] += 0.01
        save_file(weights, other / "model.safetensors")
        self.check(runs("lora"), other, tmp_path, "other: its weights are not those")
        capfd.readouterr()
        vlft.load(other, adapter=find_checkpoint(runs("lora")))
        assert "its weights are not those that the adapter was trained on" in capfd.readouterr().err

    def test_the_same_weights_in_another_layout(self, runs, case, tmp_path):
        other = vlft.convert(
            vlft.ConvertConfig(
                src=str(case.folder), dst=tmp_path / "tf", format="transformers",
                max_shard_size="200KB",
            )
        )  # fmt: skip
        assert merge_lora(config_of(runs("lora"), tmp_path / "m", model=str(other))).lost < 1e-3

    def test_an_adapter_that_was_trained_on_a_merged_model(self, runs, tmp_path):
        once = merge_lora(config_of(runs("lora"), tmp_path / "m1")).folder
        data = write_jsonl(tmp_path / "train.jsonl", make_rows(6))
        second = vlft.sft(
            vlft.SftConfig(
                model=str(once), dataset=(str(data),), image_root=GOLDEN / "images", val_ratio=0.0,
                output_dir=tmp_path / "r", max_steps=1, show_sample=False,
            )
        ).run  # fmt: skip
        twice = merge_lora(config_of(second, tmp_path / "m2")).folder
        assert len(merged_adapters(twice)) == 2
        for run in (runs("lora"), second):
            with pytest.raises(CheckpointError, match="holds this adapter already"):
                merge_lora(config_of(run, tmp_path / "m3", model=str(twice)))


@only_siglip
@pytest.mark.parametrize(("scale", "dtype"), [(1e-2, "bfloat16"), (1, "float16"), (0, "bfloat16")])
def test_what_rounding_loses_of_the_adapter_is_said(
    runs, case, sample_inputs, tmp_path, capfd, scale, dtype
):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(find_checkpoint(runs("lora")), adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t * scale if "lora_B" in n else t for n, t in tensors.items()}, path)
    shutil.copytree(case.folder, base)
    weights = load_file(base / "model.safetensors")
    half = getattr(torch, dtype)
    # Of one part of the model, the files keep another type.
    kept = {n: t if "norm" in n else t.to(half) for n, t in weights.items()}
    save_file(kept, base / "model.safetensors")
    result = merge_lora(config_of(adapter, tmp_path / "m", model=str(base)))
    written = load_file(result.folder / "model.safetensors")
    assert {n: t.dtype for n, t in written.items()} == {n: t.dtype for n, t in kept.items()}
    assert json.loads((result.folder / "config.json").read_text())["torch_dtype"] == dtype
    said = capfd.readouterr().err
    assert ("of the adapter's effect; use --dtype float32" in said) == (result.lost > 0.05)
    if scale == 0:
        assert result.lost == 0
        return
    assert f"{100 * max(0, 1 - result.lost):.0f} % of the adapter's effect is left" in said
    alone, tuned, merged = (
        logits(path, sample_inputs, dtype="float32", **adapters)
        for path, adapters in ((base, {}), (base, {"adapter": adapter}), (result.folder, {}))
    )
    # Of other inputs than the sample of the command.
    lost = float((merged - tuned).norm() / (tuned - alone).norm())
    assert result.lost / 3 < lost < 3 * result.lost
    assert (lost > 0.3) == (scale == 1e-2)
    whole = merge_lora(config_of(adapter, tmp_path / "f", model=str(base), dtype="float32"))
    assert whole.lost < 1e-3
    assert "use --dtype" not in capfd.readouterr().err


@only_siglip
def test_no_second_copy_of_the_weights_is_kept(runs, tmp_path, monkeypatch):
    """When the result is loaded for its comparison, what it was written from is gone."""
    models, held = [], []
    load, export = merge.load_model, merge.export_model

    def load_model(*args):
        held.append([model() is not None for model in models])
        model = load(*args)
        models.append(weakref.ref(model))
        return model

    def export_model(model, *args, **options):
        held.append({parameter.dtype for parameter in model.parameters()})
        export(model, *args, **options)

    monkeypatch.setattr(merge, "load_model", load_model)
    monkeypatch.setattr(merge, "export_model", export_model)
    merge_lora(config_of(runs("lora"), tmp_path / "m", dtype="bfloat16"))
    assert held == [[], {torch.bfloat16}, [False]]


@without_ocr2
def test_a_quantised_model_is_never_held_while_merging(runs, case, tmp_path, monkeypatch, capfd):
    """Each weight is quantised and dequantised by itself, however many there are."""
    alive, most, made = [], [0], [0]
    original = quantize._parameter

    def parameter(tensor, kind):
        found = original(tensor, kind)
        alive.append(weakref.ref(found))
        most[0], made[0] = max(most[0], sum(ref() is not None for ref in alive)), made[0] + 1
        return found

    run = runs("nf4")
    monkeypatch.setattr(quantize, "_parameter", parameter)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    capfd.readouterr()
    merge_lora(config_of(run, tmp_path / "m"))
    # One weight of each layer's matrices, and those of the time that is said beforehand.
    assert made[0] > 2 * 7
    assert most[0] == 1
    said = capfd.readouterr().err
    numbers = count_numbers(case.folder)
    assert f", in float32: {numbers / 2**18:.0f} MiB of memory, beside one weight file" in said
    assert re.search(r"quantising its weights as in training takes about \d+ s\n", said)
    assert re.search(r"quantising the weights as in training: \d+ of \d+", said)


@only_siglip
def test_weights_that_overflow_are_told_by_the_adapters_file(runs, case, tmp_path):
    adapter = shutil.copytree(find_checkpoint(runs("lora")), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    huge = torch.finfo(torch.float32).max
    save_file({n: torch.full_like(t, huge) for n, t in load_file(path).items()}, path)
    data = write_jsonl(tmp_path / "data.jsonl", [{"query": "a"}])
    answer = vlft.InferConfig(
        ckpt_dir=adapter, dataset=(str(data),), merge_lora=True, output=tmp_path / "o.jsonl"
    )
    for command in (
        lambda: merge_lora(config_of(adapter, tmp_path / "m")),
        lambda: vlft.infer(answer),
    ):
        said = "with this adapter the model fails|the adapter cannot be merged: NaN"
        with pytest.raises(CheckpointError, match=said) as error:
            command()
        assert error.value.place == str(path)
        assert "lower learning rate" in error.value.hint


def test_scores_that_are_all_zero_are_compared():
    """Of an adapter whose head is zeros."""
    zeros = torch.zeros(2, 3)
    merge._compare(zeros, zeros, "the merged weights")
    with pytest.raises(VerificationError, match="differ by"):
        merge._compare(zeros + 1, zeros, "the merged weights")
