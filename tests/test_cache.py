"""The vision cache: same loss as without, each image encoded once, damaged files never used."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from itertools import islice
from operator import attrgetter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    GOLDEN,
    HYBRID,
    JANUS,
    SIGLIP,
    VL2_NOAUX,
    make_rows,
    only_siglip,
    without_ocr2,
    write_jsonl,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tolerances import assert_close

import vlft
from vlft.checkpoints.load import empty_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.runs import find_checkpoint
from vlft.cli.cache import run_cache
from vlft.errors import VlftError
from vlft.packing.packer import Packer
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.loss import PackedLoss
from vlft.training.samples import load_data, loop_options, make_planner
from vlft.vision import batches, cache_plan, shards
from vlft.vision.batches import cut_batches, encode_batch
from vlft.vision.cache import Images, fill
from vlft.vision.cache_plan import cache_root, clear_cache, fingerprint, list_cache, plan_cache
from vlft.vision.shards import read_shards, write_shard


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def samples(case, processor):
    return [processor.encode(row, GOLDEN / "images") for row in make_rows(6, case)]


@pytest.fixture
def images(samples):
    return list({image.key: image for sample in samples for image in sample.images}.values())


@without_ocr2
class TestSameAsWithout:
    @pytest.mark.parametrize("stage", ["aligned", "vision"])
    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_loss_and_gradients(self, model, folder, processor, samples, images, stage, where):
        """Packed rows in float32; the cache holds the towers' features if the aligner trains."""
        torch.manual_seed(0)
        add_lora(model, folder.family, LoraOptions("ALL", train_aligner=stage == "vision"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        chosen = plan_cache(where, model, processor, images, stage)
        kept = fill(chosen, model, processor, images)
        assert (kept.encoded, kept.reused, kept.stage) == (len(images), 0, stage)
        live = Images(processor)
        objective = PackedLoss(model, folder.family)
        results = []
        for source in (live, kept):
            objective.zero_grad()
            total = 0.0
            for row in Packer(processor.chat.image_token_id, 4096, 1024).rows(samples):
                loss = objective(row, source.of(row.images))
                loss.backward()
                total += loss.item()
            trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
            results.append((total, {name: p.grad.clone() for name, p in trained.items()}))
        assert_close(results[1][0], results[0][0], "loss")
        assert_close(results[1][1], results[0][1], "gradients")

    def test_an_image_cut_in_two_ways_has_two_keys(self, case, processor):
        if case.image_mode:
            pytest.skip("takes one image")
        few = processor.encode({"query": "<image>?", "images": ["images/chart.png"]}, GOLDEN)
        row = {"query": "<image><image><image>?", "images": ["images/chart.png"] * 3}
        many = processor.encode(row, GOLDEN)
        same = few.images[0].key == many.images[0].key
        assert same == (case.family != "deepseek_vl2")


# A setting of each kind: where it stands, and another value that leaves all weights as they fit.
SETTINGS = [
    (SIGLIP, "vision_config.num_attention_heads", 8),
    (SIGLIP, "vision_config.hidden_act", "gelu_pytorch_tanh"),
    (HYBRID, "high_res_vision_config.layer_norm_eps", 1e-3),
    (HYBRID, "high_res_vision_config.window_size", 7),
    (VL2_NOAUX, "global_view_first", False),
    (VL2_NOAUX, "vision_config.layer_norm_eps", 1e-3),
    (JANUS, "vision_config.num_attention_heads", 4),
]


@pytest.mark.parametrize(
    ("case", "field", "value"), SETTINGS, indirect=["case"], ids=str, scope="session"
)
def test_the_fingerprint_depends_on_every_setting(folder, processor, field, value):
    found = set()
    for changed in (False, True):
        model = empty_model(folder)
        owner, _, name = f"config.{field}".rpartition(".")
        assert value != attrgetter(f"{owner}.{name}")(model)
        if changed:
            setattr(attrgetter(owner)(model), name, value)
        model.config.text_config.max_position_embeddings = 1000 + changed
        found.add(fingerprint(model.to_empty(device="cpu").apply(zero), processor, "aligned"))
    assert len(found) == 2


def zero(module):
    for tensor in module.parameters(recurse=False):
        tensor.data.zero_()


@only_siglip
def test_a_change_of_treatment_has_a_number(processor, tmp_path):
    """If this fails because images are opened or transformed in another way: raise TREATMENT."""
    ((_, side),) = processor.pixels.sizes((0, 0))
    rows, columns = np.mgrid[0:side, 0:side].astype(np.uint16)
    gray = Image.fromarray((columns * 500 + rows).astype(np.uint16))
    rgba = Image.fromarray(
        np.stack([rows, columns, rows // 2, 255 * (rows > columns)], -1).astype(np.uint8), "RGBA"
    )
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {"gray": gray, "rgba": rgba, "palette": rgba.convert("RGB").quantize(16)}
    digest = hashlib.sha256()
    for name, image in {**files, "turned": rgba.convert("RGB")}.items():
        image.save(tmp_path / f"{name}.png", exif=turned if name == "turned" else Image.Exif())
        row = {"query": "<image>x", "images": [f"{name}.png"]}
        ((pixels,),) = processor.pixel_values(processor.encode(row, tmp_path).images)
        digest.update(((pixels * 127.5).round().to(torch.int16)).numpy())
    assert (cache_plan.TREATMENT, digest.hexdigest()[:16]) == (1, "af3049bf37352490")


@only_siglip
class TestOnDisk:
    def fill(self, model, processor, images) -> Images:
        chosen = plan_cache("disk", model, processor, images, "aligned")
        return fill(chosen, model, processor, images)

    def files(self):
        return sorted(cache_root().rglob("*.safetensors"))

    def test_a_second_run_encodes_nothing(self, make_model, processor, images, monkeypatch):
        first = self.fill(make_model(), processor, images)
        monkeypatch.setattr(batches, "encode_batch", None)
        monkeypatch.setattr(cache_plan, "encode_batch", None)
        model = make_model()
        auto = plan_cache("auto", model, processor, images, "aligned")
        assert (auto.where, auto.reason) == ("disk", "it holds features of an earlier run")
        second = fill(auto, model, processor, images)
        assert (second.encoded, second.reused) == (0, len(images))
        for key, tensor in first.features.items():
            assert torch.equal(tensor, second.features[key])

    def test_the_fingerprint_depends_on_weights_and_stage(self, model, processor):
        before = fingerprint(model, processor, "aligned")
        assert fingerprint(model, processor, "vision") != before
        model.model.aligner.linear1.bias.data[0] += 1
        assert fingerprint(model, processor, "aligned") != before

    def test_the_fingerprint_depends_on_pillow_and_treatment(self, model, processor, monkeypatch):
        found = {fingerprint(model, processor, "aligned")}
        with monkeypatch.context() as patch:
            patch.setattr("PIL.__version__", "1.0")
            found.add(fingerprint(model, processor, "aligned"))
        monkeypatch.setattr(cache_plan, "TREATMENT", 0)
        found.add(fingerprint(model, processor, "aligned"))
        assert len(found) == 3

    def test_a_checksum_is_compared_when_an_entry_is_used_first(self, tmp_path, monkeypatch):
        checked = []
        original = shards._checksum
        path = write_shard(tmp_path, {name: torch.full((4,), 1.0) for name in "abc"})
        monkeypatch.setattr(shards, "_checksum", lambda t: checked.append(1) or original(t))
        found, _ = read_shards(tmp_path, "ab")
        assert (len(found), checked) == (2, [])
        assert found["a"].tolist() == found["a"].tolist() == [1.0] * 4
        assert checked == [1]
        data = bytearray(path.read_bytes())
        # Tensors stand in the order of their names: this is a byte of the second.
        data[-17 - 3] ^= 1
        path.write_bytes(data)
        (tmp_path / "copy").mkdir()
        shutil.copy(path, tmp_path / "copy")
        found, problems = read_shards(tmp_path / "copy", "abc")
        assert problems == []
        assert found["a"].tolist() == found["c"].tolist() == [1.0] * 4
        with pytest.raises(VlftError, match=r"(?s)features with changed bytes.*--resume RUN"):
            found["b"]
        assert sorted(read_shards(tmp_path / "copy", "abc")[0]) == ["a", "c"]

    def test_features_with_changed_bytes_end_a_run_in_good_order(
        self, make_model, processor, images
    ):
        self.fill(make_model(), processor, images)
        (path,) = self.files()
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        used = self.fill(make_model(), processor, images)
        assert used.reused == len(images)
        problem = used.problem_with(images)
        assert "features with changed bytes" in str(problem)
        again = self.fill(make_model(), processor, images)
        assert (again.encoded, again.reused) == (1, len(images) - 1)
        assert again.problem_with(images) is None

    @pytest.mark.parametrize("damage", ["cut", "empty", "text"])
    def test_damaged_features_are_encoded_again(self, make_model, processor, images, damage, capfd):
        whole = {
            k: t.clone() for k, t in self.fill(make_model(), processor, images).features.items()
        }
        (path,) = self.files()
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-7], "empty": b"", "text": b"hello"}[damage])
        again = self.fill(make_model(), processor, images)
        assert again.encoded > 0
        assert again.features.keys() == whole.keys()
        assert all(torch.equal(again.features[key], whole[key]) for key in whole)
        assert "encoded again" in capfd.readouterr().err
        third = self.fill(make_model(), processor, images)
        assert third.encoded == 0

    def test_an_interruption_loses_nothing(self, make_model, processor, images, monkeypatch):
        monkeypatch.setattr(batches, "PIXELS_AT_ONCE", 1)
        calls = []

        def stopping(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return encode_batch(*args)

        with monkeypatch.context() as patch:
            patch.setattr(batches, "encode_batch", stopping)
            with pytest.raises(KeyboardInterrupt):
                self.fill(make_model(), processor, images)
        assert len(read_shards(self.files()[0].parent, [i.key for i in images])[0]) == 2
        rest = self.fill(make_model(), processor, images)
        assert (rest.encoded, rest.reused) == (len(images) - 2, 2)

    def test_a_file_that_is_cut_off_while_it_is_used(self, make_model, processor, images):
        """Reading a page that is gone would end the process with SIGBUS."""
        used = self.fill(make_model(), processor, images)
        assert used.problem_with(images) is None
        (path,) = self.files()
        os.truncate(path, 100)
        problem = used.problem_with(images)
        assert "changed while the run used it" in str(problem)
        assert path.name in problem.place
        again = self.fill(make_model(), processor, images)
        assert (again.encoded, again.problem_with(images)) == (len(images), None)

    def test_a_file_that_is_removed_or_replaced_stays_as_it_was(
        self, make_model, processor, images
    ):
        used = self.fill(make_model(), processor, images)
        (path,) = self.files()
        shutil.copy(path, path.with_suffix(".new"))
        os.truncate(path.with_suffix(".new"), 100)
        path.with_suffix(".new").replace(path)
        assert used.problem_with(images) is None
        path.unlink()
        assert used.problem_with(images) is None
        assert all(tensor.isfinite().all() for tensor in used.features.values())

    def test_a_pipe_among_the_files(self, tmp_path):
        write_shard(tmp_path, {"a": torch.ones(3)})
        os.mkfifo(tmp_path / "b.safetensors")
        (tmp_path / "c.safetensors").mkdir()
        found, problems = read_shards(tmp_path, ["a"])
        assert sorted(found) == ["a"]
        assert problems == [f"{name}.safetensors: not a regular file" for name in "bc"]

    def test_a_killed_writer_leaves_no_half_file(self, tmp_path, monkeypatch):
        def killed(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write_shard(tmp_path, {"a": torch.ones(3)})
        assert not list(tmp_path.glob("*"))

    def test_two_writers_may_share_a_folder(self, tmp_path):
        for number in range(2):
            write_shard(tmp_path, {"a": torch.ones(3), f"b{number}": torch.full((2,), 1.0)})
        found, problems = read_shards(tmp_path, ["a", "b0", "b1", "c"])
        assert sorted(found) == ["a", "b0", "b1"]
        assert not problems

    def test_bfloat16_and_the_checksum_of_each_entry(self, tmp_path):
        path = write_shard(tmp_path, {"a": torch.ones(3, dtype=torch.bfloat16)})
        with safe_open(path, framework="pt") as file:
            assert file.metadata().keys() == {"a"}
        assert read_shards(tmp_path, ["a"])[0]["a"].dtype == torch.bfloat16

    def test_list_and_clear(self, model, processor, images):
        assert list_cache() == []
        self.fill(model, processor, images)
        ((name, files, size),) = list_cache()
        assert (len(name), files) == (32, 1)
        assert size == self.files()[0].stat().st_size
        assert clear_cache() == (size, [])
        assert list_cache() == []

    @pytest.mark.parametrize("linked", ["root", "folder"])
    def test_clear_through_a_link(self, tmp_path, linked):
        disk = tmp_path / "disk"
        write_shard(disk / "abc", {"a": torch.ones(300)})
        (disk / "abc" / ".tmpX1").write_bytes(b"cut off")
        link = cache_root() if linked == "root" else cache_root() / "abc"
        link.parent.mkdir(parents=True)
        link.symlink_to(disk if linked == "root" else disk / "abc")
        size, problems = clear_cache()
        assert size > 1200
        assert not problems
        assert list_cache() == []
        assert not list(disk.rglob("*.safetensors"))

    def test_clear_says_what_it_leaves(self, capsys):
        for name in ("abc", "def"):
            write_shard(cache_root() / name, {"a": torch.ones(3)})
        (cache_root() / "abc" / "mine.txt").write_text("mine")
        with pytest.raises(VlftError, match=r"(?s)1 left: .*abc: Directory not empty"):
            run_cache(vlft.config.CacheConfig(action="clear"))
        assert "MiB removed" in capsys.readouterr().out
        assert [path.name for path in cache_root().rglob("*")] == ["abc", "mine.txt"]


@only_siglip
class TestPlan:
    def plan(self, model, processor, images, asked="auto"):
        return plan_cache(asked, model, processor, images, "aligned")

    def test_by_free_space(self, model, processor, images, monkeypatch):
        assert self.plan(model, processor, images).where == "disk"
        full = shutil._ntuple_diskusage(10**9, 10**9, 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
        chosen = self.plan(model, processor, images)
        assert (chosen.where, "the disk is nearly full" in chosen.reason) == ("memory", True)
        monkeypatch.setattr("os.sysconf", lambda _: 10)
        assert self.plan(model, processor, images).where == "off"

    @pytest.mark.parametrize("asked", ["off", "memory", "disk"])
    def test_as_asked(self, model, processor, images, asked):
        chosen = self.plan(model, processor, images, asked)
        assert (chosen.where, chosen.reason) == (asked, "as asked")

    @pytest.mark.parametrize("home", ["/proc/nope", "file", "none"])
    @pytest.mark.parametrize("asked", ["auto", "disk"])
    def test_where_no_folder_can_be_written(
        self, model, processor, images, monkeypatch, tmp_path, home, asked
    ):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home == "file" else home)
        if home == "none":
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError))
        if asked == "disk":
            with pytest.raises(VlftError, match="use --vision-cache memory"):
                fill(self.plan(model, processor, images, asked), model, processor, images)
            return
        chosen = self.plan(model, processor, images)
        assert chosen.where == "memory"
        assert ("no home folder" if home == "none" else "cannot be written") in chosen.reason
        assert fill(chosen, model, processor, images).encoded == len(images)

    def test_a_folder_of_features_that_is_read_only(self, model, processor, images, monkeypatch):
        fill(self.plan(model, processor, images), model, processor, images)
        refused = Mock(side_effect=PermissionError(13, "Permission denied"))
        monkeypatch.setattr(cache_plan.tempfile, "TemporaryFile", refused)
        chosen = self.plan(model, processor, images)
        assert (chosen.where, "Permission denied" in chosen.reason) == ("memory", True)

    def test_aligned_features_are_measured_without_encoding_one(
        self, model, processor, images, monkeypatch
    ):
        expected = sum(f.nbytes for f in encode_batch(model, processor, images, "aligned"))
        monkeypatch.setattr(cache_plan, "encode_batch", None)
        assert cache_plan._size_of_features(model, processor, images, "aligned") == expected

    def test_no_images(self, model, processor):
        assert self.plan(model, processor, []).where == "off"


@only_siglip
def test_batches_depend_on_the_images_alone(processor, images, monkeypatch):
    ((_, size),) = processor.pixels.sizes((0, 0))
    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", 2 * size * size)
    assert [len(batch) for batch in cut_batches(images * 2, processor)] == [2, 2, 2]
    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", 1)
    assert [len(batch) for batch in cut_batches(images, processor)] == [1, 1, 1]


@only_siglip
def test_encoding_draws_no_random_number(model, processor, images):
    """Otherwise the dropout of a run would depend on which images were cached before it."""
    state = torch.get_rng_state()
    list(batches.encode_all(model, processor, images, "aligned", {image.key for image in images}))
    assert torch.equal(torch.get_rng_state(), state)


@only_siglip
def test_many_batches_where_processes_are_spawned(model, processor, tmp_path, monkeypatch):
    """As Python does by default on macOS, on Windows and from 3.14 on; nothing is pickled."""
    images = []
    for shade in range(10):
        path = tmp_path / f"{shade}.png"
        Image.new("RGB", (32, 32), (20 * shade, 0, 0)).save(path)
        row = {"query": "<image>What?", "response": "Red.", "images": [path.name]}
        images += processor.encode(row, tmp_path).images
    started = Mock(side_effect=AssertionError("a process is started"))
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", started)
    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", 1)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        keys = [image.key for image in images]
        found = dict(batches.encode_all(model, processor, images, "aligned", keys))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert list(found) == keys
    assert len(cut_batches(images, processor)) == 10


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (6, 3), (64, 4)])
def test_threads_that_decode_are_half_of_the_cores_and_at_most_four(monkeypatch, cores, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    assert batches._threads() == threads
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert batches._threads() == threads


@only_siglip
def test_decoding_ahead_changes_nothing(model, processor, images, monkeypatch):
    def encode():
        keys = {image.key for image in images}
        return dict(batches.encode_all(model, processor, images, "aligned", keys))

    monkeypatch.setattr(batches, "PIXELS_AT_ONCE", 1)
    monkeypatch.setattr(batches, "AHEAD", 1)
    found = []
    # Fewer batches than are decoded ahead, as many, and more.
    for threads in (1, len(images), 4):
        monkeypatch.setattr(batches, "_threads", lambda threads=threads: threads)
        found.append(encode())
    assert [list(features) for features in found] == [[image.key for image in images]] * 3
    for features in found[1:]:
        assert all(torch.equal(features[key], found[0][key]) for key in features)


@without_ocr2
class TestRuns:
    def config(self, case, tmp_path, **settings):
        data = write_jsonl(tmp_path / "train.jsonl", make_rows(10, case))
        defaults = {
            "model": str(case.folder), "dataset": (str(data),), "val_ratio": 0.2, "batch_size": 4,
            "image_root": GOLDEN / "images", "output_dir": tmp_path / "output",
            "num_train_epochs": 2, "learning_rate": 1e-2, "show_sample": False,
            "device": "cpu", "dtype": "float32", **case.settings,
        }  # fmt: skip
        return vlft.SftConfig(**{**defaults, **settings})

    def encoded(self, run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [row["images_encoded"] for row in map(json.loads, lines) if "loss" in row]

    def images_in_rows(self, case, config):
        """Distinct images in the rows of each step, which towers without a cache encode."""
        processor = describe(case.folder).processor()
        data = load_data(config, processor)[0]
        planner = make_planner(config, processor, data, "cpu")
        steps = loop_options(config, planner.schedule).total_steps
        return [
            sum(
                len({image.key for index in plan.members for image in data.outlines[index].images})
                for plan in plans
            )
            for plans in islice(planner.steps(), steps)
        ]

    def test_each_image_is_encoded_once_in_two_epochs_and_two_runs(self, case, tmp_path, capfd):
        first = vlft.sft(self.config(case, tmp_path)).run
        images = 3
        assert self.encoded(first) == [images, 0, 0, 0]
        assert f"{images} images encoded, 0 from earlier runs" in capfd.readouterr().err
        second = vlft.sft(self.config(case, tmp_path)).run
        assert self.encoded(second) == [0, 0, 0, 0]
        assert f"0 images encoded, {images} from earlier runs" in capfd.readouterr().err
        weights = [
            load_file(find_checkpoint(r) / "adapter_model.safetensors") for r in (first, second)
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    @only_siglip
    def test_off_encodes_each_image_once_per_row(self, case, tmp_path):
        config = self.config(case, tmp_path, vision_cache="off", tokens_per_microbatch=60)
        images = self.images_in_rows(case, config)
        assert self.encoded(vlft.sft(config).run) == images
        # More than the 3 that exist, also within a step.
        assert max(images) > 3

    @only_siglip
    def test_nothing_is_cached_if_the_tower_trains(self, case, tmp_path):
        config = self.config(case, tmp_path, train_vision=True)
        assert self.encoded(vlft.sft(config).run) == self.images_in_rows(case, config)
        assert list_cache() == []

    @only_siglip
    def test_the_aligner_trains_on_features_before_it(self, case, tmp_path):
        losses = []
        for where in ("off", "disk"):
            config = self.config(case, tmp_path, train_aligner=True, vision_cache=where)
            lines = (vlft.sft(config).run / "metrics.jsonl").read_text().splitlines()
            losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
        assert_close(losses[1], losses[0], "run losses")
