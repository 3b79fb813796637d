"""Training to draw: targets, loss and gradients, packed as one at a time, runs, merge, export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, JANUS, JANUS_PRO, SIGLIP, write_jsonl
from PIL import Image
from safetensors.torch import load_file
from tolerances import assert_close

import vlft
from vlft.checkpoints.export import canonical_name
from vlft.checkpoints.load import load_model
from vlft.checkpoints.placement import Placement
from vlft.checkpoints.runs import find_checkpoint
from vlft.data.drawing import unconditional, with_start
from vlft.data.encode import EncodedImage
from vlft.data.outline import outline
from vlft.errors import ConfigError, DataError
from vlft.inference.image_files import read_facts
from vlft.packing.dropout import PromptDropout
from vlft.packing.packer import Packer
from vlft.packing.planner import Planner
from vlft.packing.prefix_tree import pack
from vlft.packing.schedule import Schedule
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.loss import PackedLoss
from vlft.vision.batches import encode_batch
from vlft.vision.cache import Images

BOTH = pytest.mark.parametrize("case", [JANUS, JANUS_PRO], indirect=True, scope="session", ids=str)
ONE = pytest.mark.parametrize("case", [JANUS_PRO], indirect=True, scope="session", ids=str)
DRAWN = [
    {"query": "a red square", "response_images": ["photo_a.jpg"]},
    {"query": "a red square", "response_images": ["photo_b.jpg"]},
    {"query": "a red square", "response_images": ["photo_b.jpg"]},
    {"query": "<image>Make it blue.", "images": ["photo_a.jpg"], "response_images": ["chart.png"]},
]
MIXED = [
    *DRAWN,
    {"query": "<image>What is it?", "response": "A photo.", "images": ["photo_a.jpg"]},
    {"query": "<image>What is it?", "response": "A chart.", "images": ["photo_a.jpg"]},
    {"query": "a red square", "response": "I like it."},
]


def codes_of(model, processor, samples) -> dict[str, torch.Tensor]:
    images = {image.key: image for s in samples for image in s.images if image.drawn}
    if not images:
        return {}
    found = encode_batch(model, processor, list(images.values()), "codes")
    return dict(zip(images, found, strict=True))


def loss_of(model, processor, samples, *, share: bool = True) -> tuple[torch.Tensor, PackedLoss]:
    """The loss sum of some samples in a row."""
    row = pack(samples, processor.chat.image_token_id, share=share)
    images = Images(processor, codes=codes_of(model, processor, samples))
    objective = PackedLoss(model, processor.family)
    return objective(row, images.of(row.images, row.codes.images)), objective


@BOTH
class TestGolden:
    def test_loss_and_gradients(self, case, folder, processor, model):
        """From a packed row. The case gives codes, whatever image they are of."""
        data = json.loads((case.cases / "t2i_train.json").read_text("utf-8"))
        expected = load_file(case.cases / "t2i_train.safetensors")
        codes = expected["codes"][0].long()
        row = {"query": data["conversation"][0]["content"], "system": ""}
        prompt = with_start(processor.encode(row), processor.chat)
        assert torch.equal(prompt.input_ids, expected["input_ids"][0].long())
        image = EncodedImage(Path("x.png"), "0", len(codes) - 1, drawn=True)
        inputs = torch.full((len(codes) - 1,), processor.chat.image_token_id)
        sample = dataclasses.replace(
            prompt,
            input_ids=torch.cat([prompt.input_ids, inputs]),
            labels=torch.full((len(prompt) + len(inputs),), -100),
            images=(image,),
        )
        packed = pack([sample], processor.chat.image_token_id)
        assert packed.codes.weight.tolist() == [1.0] * len(codes)
        model.requires_grad_(True)
        images = Images(processor, codes={image.key: codes}).of((), packed.codes.images)
        loss = PackedLoss(model, folder.family)(packed, images) / len(codes)
        loss.backward()
        assert_close(loss.item(), data["loss"], "golden loss")
        native = {canonical_name(name): p.grad for name, p in model.named_parameters()}
        for name, norm in data["grad_norms"].items():
            match = folder.family.keys.from_original(name)
            gradient = match.to_original([native[canonical_name(part)] for part in match.native])
            assert_close(gradient.double().norm().item(), norm, "golden gradients")


@ONE
class TestSamples:
    def test_the_prompt_is_that_of_drawing(self, processor, shared_model):
        sample = processor.encode(DRAWN[0], GOLDEN / "images")
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vlft.inference.draw.draw_batch", lambda *a: seen.extend(a[2]) or [])
            vlft.draw(shared_model, processor, "a red square")
        prompt = seen[0].prompt.input_ids
        assert torch.equal(sample.input_ids[: len(prompt)], prompt)
        codes = processor.pixels.tokens
        assert len(sample) == len(prompt) + codes - 1
        assert outline(sample, processor.chat.image_token_id).targets == codes

    def test_an_unconditional_sample_keeps_its_length_and_codes(self, processor):
        sample = processor.encode(DRAWN[3], GOLDEN / "images")
        found = unconditional(sample, processor.chat)
        assert len(found) == len(sample)
        assert found.images == sample.images[1:]
        end = len(sample) - sample.drawn.tokens
        assert found.input_ids[1 : end - 1].unique().tolist() == [processor.chat.pad_id]
        assert found.input_ids[end - 1] == processor.chat.image_border[0][0]

    def test_codes_do_not_depend_on_the_dtype_of_the_model(self, processor, make_model):
        samples = [processor.encode(row, GOLDEN / "images") for row in DRAWN]
        # The files hold bfloat16, so that nothing is lost.
        whole, half = (
            codes_of(make_model(dtype=dtype), processor, samples)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert all(torch.equal(whole[key], half[key]) for key in whole)

    @pytest.mark.parametrize(
        ("row", "found"),
        [
            ({"response_images": ["a.jpg", "b.jpg"]}, '2 images in "response_images", 1 is all'),
            ({"response_images": ["a.jpg"], "response": "text"}, "a reply of text and"),
            ({"response_images": ["nowhere.jpg"]}, "nowhere.jpg"),
            ({"response_images": 3}, "response_images"),
        ],
    )
    def test_mistakes(self, row, found, tmp_path, case):
        path = write_jsonl(tmp_path / "train.jsonl", [{"query": "red", **row}])
        config = vlft.SftConfig(model=str(case.folder), dataset=(str(path),))
        with pytest.raises(DataError, match=found):
            vlft.sft(config)

    def test_a_family_that_does_not_draw(self, case, tmp_path):
        path = write_jsonl(tmp_path / "train.jsonl", DRAWN[:1])
        config = vlft.SftConfig(
            model=str(SIGLIP.folder), dataset=(str(path),), image_root=GOLDEN / "images"
        )
        with pytest.raises(DataError, match="models of this family do not draw\n hint: use Janus"):
            vlft.sft(config)


@BOTH
@pytest.mark.parametrize("share", [True, False])
def test_packed_as_one_at_a_time(processor, model, share):
    """Loss and every gradient of mixed rows, in float32."""
    add_lora(
        model,
        processor.family,
        LoraOptions("ALL", rank=4, train_aligner=True, train_gen_aligner=True, train_gen_head=True),
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained} >= {
        "generation_head", "generation_aligner", "aligner", "language_model",
    }  # fmt: skip
    torch.manual_seed(0)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    samples = [processor.encode(row, GOLDEN / "images") for row in MIXED]
    loss, objective = loss_of(model, processor, samples, share=share)
    loss.backward()
    packed = {name: p.grad.clone() for name, p in trained.items()}
    of_codes = objective.code_loss
    model.zero_grad()
    alone, alone_codes = torch.zeros(()), torch.zeros(())
    for sample in samples:
        one, objective = loss_of(model, processor, [sample])
        one.backward()
        alone, alone_codes = alone + one.detach(), alone_codes + objective.code_loss
    assert_close(loss.detach(), alone, "loss")
    assert_close(of_codes, alone_codes, "loss")
    assert 0 < float(alone_codes) < float(alone)
    assert_close(packed, {name: p.grad for name, p in trained.items()}, "gradients")


@ONE
def test_drawings_of_a_prompt_share_it(processor):
    samples = [processor.encode(row, GOLDEN / "images") for row in DRAWN[:3]]
    row = pack(samples, processor.chat.image_token_id)
    codes = processor.pixels.tokens
    prompt = len(samples[0]) - codes + 1
    assert len(row) == prompt + 2 * (codes - 1)
    # The second and the third are the same sample.
    assert sorted(row.codes.weight.tolist()) == [1.0] * codes + [2.0] * codes
    plan = Packer(processor.chat.image_token_id, 4096, 1024).plan(
        [outline(s, processor.chat.image_token_id) for s in samples]
    )
    assert [(p.tokens, p.targets, p.codes) for p in plan] == [(len(row), 3 * codes, 3 * codes)]


@ONE
class TestDropout:
    def planner(self, processor, share: float) -> Planner:
        samples = [processor.encode(row, GOLDEN / "images") for row in MIXED]
        outlines = [outline(s, processor.chat.image_token_id) for s in samples]
        dropout = PromptDropout(share, 7, processor.chat.pad_id)
        packer = Packer(processor.chat.image_token_id, 4096, 1024)
        return Planner(Schedule(range(len(MIXED)), 4, 0), packer, outlines, dropout)

    def test_only_drawings_lose_their_prompt(self, processor):
        planner = self.planner(processor, 1.0)
        dropped = {i for n in range(2) for plan in planner.step(n) for i in plan.unprompted}
        assert dropped == set(range(len(DRAWN)))

    def test_the_share_and_its_chance(self, processor):
        planner = self.planner(processor, 0.25)
        epochs = [
            frozenset(i for n in (2 * e, 2 * e + 1) for p in planner.step(n) for i in p.unprompted)
            for e in range(200)
        ]
        assert 0.19 < sum(map(len, epochs)) / (200 * len(DRAWN)) < 0.31
        assert len(set(epochs)) > 8

    def test_what_is_planned_is_what_is_packed(self, processor):
        planner = self.planner(processor, 0.5)
        for number in range(8):
            for plan in planner.step(number):
                samples = []
                for index in plan.members:
                    sample = processor.encode(MIXED[index], GOLDEN / "images")
                    if index in plan.unprompted:
                        sample = unconditional(sample, processor.chat)
                    samples.append(sample)
                row = planner.packer.row(samples)
                assert len(row) == plan.tokens
                assert row.weight.sum() + row.codes.weight.sum() == plan.targets
                assert row.codes.weight.sum() == plan.codes


def config_of(tmp_path, case, rows=MIXED, **given) -> vlft.SftConfig:
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    settings = {
        "model": str(case.folder),
        "dataset": (str(path),),
        "val_dataset": (str(path),),
        "image_root": GOLDEN / "images",
        "output_dir": tmp_path / "output",
        "batch_size": 4,
        "num_train_epochs": 2,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "show_sample": False,
        "cfg_dropout": 0.3,
        "train_gen_head": True,
        "train_gen_aligner": True,
    }
    return vlft.SftConfig(**{**settings, **given})


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_bits(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return vlft.sft(config_of(tmp_path_factory.mktemp("run"), JANUS_PRO))


@ONE
class TestRuns:
    def test_both_losses_are_reported_apart(self, run, processor):
        rows = metrics(run.run)
        steps = [row for row in rows if "loss" in row]
        assert all("code_loss" in row for row in steps)
        first = next(row for row in rows if "val_loss" in row)
        codes, total = processor.pixels.tokens * len(DRAWN), 0
        texts = [outline(processor.encode(r, GOLDEN / "images"), processor.chat.image_token_id)
                 for r in MIXED[len(DRAWN):]]  # fmt: skip
        total = sum(item.targets for item in texts)
        mean = (codes * first["val_code_loss"] + total * first["val_text_loss"]) / (codes + total)
        assert first["val_loss"] == pytest.approx(mean, rel=1e-6)
        last = [row for row in rows if "val_loss" in row][-1]
        assert last["val_code_loss"] < first["val_code_loss"]

    def test_resume(self, run, case, tmp_path, monkeypatch):
        """A run that stops after two of its four steps ends with the same bits."""
        from vlft.training import loop

        original, taken = loop.take_step, []

        def take_step(job, plans):
            taken.append(1)
            job_interrupt = len(taken) == 2
            found = original(job, plans)
            if job_interrupt:
                raise KeyboardInterrupt
            return found

        config = config_of(tmp_path, case, save_steps=1)
        with monkeypatch.context() as patch:
            patch.setattr(loop, "take_step", take_step)
            with pytest.raises(KeyboardInterrupt):
                vlft.sft(config)
        (cut,) = (tmp_path / "output").glob("*/v0-*")
        rest = vlft.sft(vlft.SftConfig(resume=cut))
        found, whole = (
            load_file(find_checkpoint(r.run) / "adapter_model.safetensors") for r in (rest, run)
        )
        assert same_bits(found, whole)

    def test_merged_it_draws_the_same_and_keeps_what_was_not_trained(self, run, case, tmp_path):
        merged = tmp_path / "merged"
        vlft.merge_lora(vlft.MergeLoraConfig(ckpt_dir=run.run, output_dir=merged, dtype="float32"))
        before = torch.load(case.folder / "pytorch_model.bin", weights_only=True)
        after = load_file(merged / "model.safetensors")
        trained = ("gen_aligner", "gen_head", "language_model")
        kept = [name for name in after if name.startswith("gen_") and not name.startswith(trained)]
        assert len(kept) > 50
        assert all(torch.equal(after[name], before[name].float()) for name in kept)
        assert not torch.equal(after["gen_head.vision_head.weight"],
                               before["gen_head.vision_head.weight"].float())  # fmt: skip
        drawn = []
        for path, adapter in ((case.folder, find_checkpoint(run.run)), (merged, None)):
            model, processor = vlft.load(path, adapter)
            drawn += vlft.draw(model, processor, "a red square", temperature=0)
        assert torch.equal(drawn[0].codes, drawn[1].codes)

    def test_merged_in_transformers_layout(self, run, case, folder, tmp_path):
        """transformers opens it, it draws the same, and what was not trained has the same bits."""
        from transformers import JanusForConditionalGeneration

        merged = tmp_path / "merged"
        vlft.merge_lora(
            vlft.MergeLoraConfig(
                ckpt_dir=run.run, output_dir=merged, dtype="float32", format="transformers"
            )
        )
        found = JanusForConditionalGeneration.from_pretrained(merged).state_dict()
        whole = Placement(torch.device("cpu"), torch.float32)
        before = load_model(folder, whole).state_dict()
        kept = [name for name in before if "vqmodel" in name or "generation_embeddings" in name]
        assert len(kept) > 50
        assert all(torch.equal(found[name], before[name]) for name in kept)
        name = "model.generation_head.vision_head.weight"
        assert not torch.equal(found[name], before[name])
        drawn = []
        for path, adapter in ((case.folder, find_checkpoint(run.run)), (merged, None)):
            model, processor = vlft.load(path, adapter)
            drawn += vlft.draw(model, processor, "a red square", temperature=0)
        assert torch.equal(drawn[0].codes, drawn[1].codes)

    def test_plain_peft_loads_it(self, run, case, folder):
        from peft import PeftModel

        placement = Placement(torch.device("cpu"), torch.float32)
        plain = PeftModel.from_pretrained(load_model(folder, placement), find_checkpoint(run.run))
        ours, processor = vlft.load(case.folder, find_checkpoint(run.run))
        drawings = [vlft.draw(m, processor, "red", temperature=0)[0] for m in (plain, ours)]
        assert torch.equal(drawings[0].codes, drawings[1].codes)

    def test_an_untrained_generator_is_kept_bit_for_bit(self, case, tmp_path):
        settings = {"train_gen_head": False, "train_gen_aligner": False, "max_steps": 1}
        run = vlft.sft(config_of(tmp_path, case, **settings))
        before = torch.load(case.folder / "pytorch_model.bin", weights_only=True)
        vlft.merge_lora(vlft.MergeLoraConfig(ckpt_dir=run.run, output_dir=tmp_path / "merged"))
        after = load_file(tmp_path / "merged" / "model.safetensors")
        names = [name for name in before if name.startswith("gen_") and "codebook_used" not in name]
        assert all(torch.equal(after[name], before[name]) for name in names)

    def test_codes_are_cached(self, case, tmp_path, capfd):
        settings = {"max_steps": 1, "vision_cache": "disk"}
        vlft.sft(config_of(tmp_path, case, **settings))
        capfd.readouterr()
        vlft.sft(config_of(tmp_path, case, **settings))
        err = capfd.readouterr().err
        assert "codes (disk: as asked): 0 images encoded, 3 from earlier runs" in err

    def test_without_a_cache_codes_are_in_memory(self, case, tmp_path, capfd):
        run = vlft.sft(config_of(tmp_path, case, max_steps=1, vision_cache="off"))
        assert "codes (memory: as asked): 3 images encoded" in capfd.readouterr().err
        assert np.isfinite(metrics(run.run)[0]["val_loss"])

    def test_drawings_alone(self, case, tmp_path, capfd):
        run = vlft.sft(config_of(tmp_path, case, DRAWN[:3], max_steps=2))
        assert "next: vlft draw --ckpt-dir" in capfd.readouterr().err
        last = metrics(run.run)[-1]
        assert last["val_loss"] == last["val_code_loss"]
        assert "val_text_loss" not in last

    @pytest.mark.parametrize("settings", [
        {"quantize": "nf4"}, {"tuner": "full", "learning_rate": 1e-3}, {"train_vision": True},
        {"gradient_checkpointing": True}, {"dtype": "bfloat16"},
    ], ids=str)  # fmt: skip
    def test_settings(self, case, tmp_path, settings):
        """The code loss falls."""
        run = vlft.sft(config_of(tmp_path, case, DRAWN[:3], cfg_dropout=0, **settings))
        found = [row["val_code_loss"] for row in metrics(run.run) if "val_loss" in row]
        assert found[-1] < found[0]

    def test_a_tuned_checkpoint_draws(self, case, run, tmp_path, monkeypatch, capfd):
        """Prompts, and the queries of the run's validation set whose replies are images."""
        monkeypatch.chdir(tmp_path)
        from vlft.inference.draw_run import run_draw

        queries = [row["query"] for row in DRAWN]
        greedy = {"ckpt_dir": run.run, "temperature": 0.0}
        drawn = run_draw(vlft.DrawConfig(**greedy, load_dataset_config=True))
        assert "records whose reply is text are left out" in capfd.readouterr().err
        assert [read_facts(path)["prompt"] for path in drawn.images] == [[q] for q in queries]
        asked = vlft.DrawConfig(**greedy, prompt=(queries[0],), output_dir=tmp_path / "one")
        (path,) = run_draw(asked).images
        with Image.open(path) as one, Image.open(drawn.images[0]) as other:
            assert one.tobytes() == other.tobytes()

    def test_a_validation_set_of_texts_is_not_drawn(self, case, tmp_path):
        from vlft.inference.draw_run import run_draw

        rows = MIXED[len(DRAWN) :]
        settings = {"train_gen_head": False, "train_gen_aligner": False, "cfg_dropout": 0.1}
        run = vlft.sft(config_of(tmp_path, case, rows, max_steps=1, **settings))
        with pytest.raises(ConfigError, match="no reply of the validation set is an image"):
            run_draw(vlft.DrawConfig(ckpt_dir=run.run, load_dataset_config=True))


@pytest.mark.parametrize("case", [SIGLIP], indirect=True, ids=str)
@pytest.mark.parametrize("name", ["train_gen_head", "train_gen_aligner"])
def test_parts_that_a_family_lacks(case, tmp_path, name):
    rows = [{"query": "a", "response": "b"}] * 3
    settings = {"train_gen_head": False, "train_gen_aligner": False, name: True}
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: .* does not draw images"):
        vlft.sft(config_of(tmp_path, case, rows, **settings))


class TestData:
    def test_check_writes_what_it_read(self, tmp_path):
        """Its messages are read as the same conversations."""
        from vlft.checkpoints.locate import describe
        from vlft.cli.commands import COMMANDS
        from vlft.data.dataset import load_dataset
        from vlft.data.options import DataOptions

        source, written = write_jsonl(tmp_path / "a.jsonl", MIXED), tmp_path / "b.jsonl"
        COMMANDS["check"].run(
            vlft.config.CheckConfig(
                dataset=(str(source),), image_root=GOLDEN / "images", write=written
            ),
            set(),
        )
        encoder = describe(JANUS_PRO.folder).processor().encoder
        first, again = (
            load_dataset([str(path)], encoder, DataOptions(image_root=GOLDEN / "images"))
            for path in (source, written)
        )
        assert len(first) == len(again) == len(MIXED)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.input_ids, other.input_ids)
            assert [i.key for i in one.images] == [i.key for i in other.images]
        assert first.groups()[:3] == [0, 1, 2]

    @ONE
    def test_infer_leaves_drawings_out(self, case, run, capfd, tmp_path):
        found = vlft.infer(
            vlft.InferConfig(
                ckpt_dir=run.run,
                load_dataset_config=True,
                max_new_tokens=2,
                output=tmp_path / "a.jsonl",
            )
        )
        assert found.count == len(MIXED) - len(DRAWN)
        assert "4 records whose reply is an image are left out" in capfd.readouterr().err
