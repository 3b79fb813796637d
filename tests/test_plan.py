"""``vlft plan`` counts what the models have, and plans the rows that training packs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from math import prod
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, MATRIX, make_rows, only_siglip, write_jsonl
from published import PUBLISHED
from torch import nn

import vlft
from vlft.checkpoints.load import empty_model
from vlft.checkpoints.locate import ModelFolder, describe
from vlft.config import PlanConfig
from vlft.errors import ConfigError
from vlft.families.base import is_in
from vlft.families.registry import find_family
from vlft.gpus import gpu_gib
from vlft.models.experts import PLAIN_EXPERTS
from vlft.planning import memory
from vlft.planning.estimate import (
    DataPlan,
    find_model,
    memory_spec,
    plan_data,
    published_sizes,
)
from vlft.planning.memory import LOSS_POSITIONS, estimate_memory, trained_params
from vlft.planning.published import PUBLISHED_MODELS
from vlft.planning.report import run_plan, smaller_settings, verdict
from vlft.planning.sizes import (
    ModelSizes,
    TowerSizes,
    language_params,
    language_weights,
    lm_head_params,
    text_sizes,
    tower_sizes,
)
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.loss import CHUNK
from vlft.training.preview import parameter_count
from vlft.training.samples import distinct_images, load_data, make_planner
from vlft.vision import batches

GIB = 2**30
CONFIGS = {p.name: p for p in PUBLISHED} | {str(case): case for case in MATRIX}
# One of each size; the golden models have features that no published model has.
DISTINCT = [
    *("deepseek-vl-1.3b-chat", "deepseek-vl-7b-chat", "deepseek-vl2-tiny", "deepseek-vl2-small"),
    *("deepseek-vl2", "Janus-Pro-7B"),
]
DISTINCT = [f"deepseek-ai/{name}" for name in DISTINCT] + ["deepseek-vl2-mla", "janus"]


@pytest.fixture(params=DISTINCT)
def built(request, tmp_path):
    """A model folder and its model on the meta device: published sizes and golden ones."""
    found = CONFIGS[request.param]
    if hasattr(found, "folder"):
        folder = describe(found.folder)
    else:
        family, layout = find_family(found.config, place=found.name)
        folder = ModelFolder(tmp_path, found.name, dict(found.config), family, layout)
    return folder, empty_model(folder, image_token_id=1)


def test_names_shapes_and_counts_are_those_of_the_model(built):
    folder, model = built
    parts = folder.family.parts
    text = text_sizes(folder.native_config(1)["text_config"])
    expected = {}
    for name, module in model.named_modules():
        if is_in(name, [parts.language]) and isinstance(module, nn.Linear):
            expected[name] = tuple(module.weight.shape)
        elif is_in(name, [parts.language]) and isinstance(module, PLAIN_EXPERTS):
            weights = module.named_parameters(recurse=False)
            expected |= {f"{name}.{leaf}": tuple(weight.shape) for leaf, weight in weights}
    assert language_weights(text, parts.language) == expected
    counts = {name: p.numel() for name, p in model.named_parameters()}
    language = sum(count for name, count in counts.items() if is_in(name, [parts.language]))
    head = sum(count for name, count in counts.items() if is_in(name, [parts.head]))
    assert (language_params(text), lm_head_params(text)) == (language, head)
    model.requires_grad_(False)
    tuned = add_lora(model, folder.family, LoraOptions("ALL", rank=4))
    trained = sum(parameter_count(p) for p in tuned.parameters() if p.requires_grad)
    sizes = ModelSizes(
        text, 0, tower_sizes(folder.native_config(1)), folder.family.attention_inputs
    )
    spec = memory_spec(PlanConfig(lora_target_modules="ALL", lora_rank=4), sizes)
    assert trained_params(sizes, spec) == trained


@pytest.mark.parametrize("known", PUBLISHED_MODELS, ids=lambda known: known.id)
def test_sizes_of_published_models(known):
    config = CONFIGS[known.id].config
    family, _ = find_family(config, place=known.id)
    native = family.native_config(config, 1)
    assert text_sizes(native["text_config"]) == known.llm
    assert tower_sizes(native) == known.towers
    total = sum(prod(shape) for shape in CONFIGS[known.id].tensors().values())
    language = language_params(known.llm) + lm_head_params(known.llm)
    assert published_sizes(known).other_params == pytest.approx(total - language, abs=5e6)


@pytest.fixture
def config(case, tmp_path):
    return PlanConfig(
        model=str(case.folder),
        dataset=(str(write_jsonl(tmp_path / "train.jsonl", make_rows(12, case))),),
        **case.settings,
        image_root=GOLDEN / "images",
        batch_size=4,
        tokens_per_microbatch=300,
        device="cpu",
    )


def test_rows_and_tokens_are_those_of_training(config, folder, processor):
    found = plan_data(config, folder)
    train, val = load_data(config, processor)
    planner = make_planner(config, processor, train, "cpu")
    rows = [
        row
        for indices in planner.schedule.epoch(0)
        for row in planner.packer.rows([train[i] for i in indices])
    ]
    assert (found.samples, found.validation) == (len(train), len(val))
    assert (found.rows, found.steps) == (len(rows), 3)
    assert (found.packed_tokens, found.longest_row) == (sum(map(len, rows)), max(map(len, rows)))
    assert found.tokens == sum(row.sample_tokens for row in rows)
    assert found.images == len({image.key for row in rows for image in row.images})


@only_siglip
def test_a_plan_encodes_each_sample_once(config, processor):
    calls = []

    class Tokenizer:
        def __getattr__(self, name):
            return getattr(processor.chat.tokenizer, name)

        def encode(self, text, **options):
            calls.append(text)
            return processor.chat.tokenizer.encode(text, **options)

        def encode_batch_fast(self, texts, **options):
            calls.extend(texts)
            return processor.chat.tokenizer.encode_batch_fast(texts, **options)

    chat = dataclasses.replace(processor.chat, tokenizer=Tokenizer())
    counted = dataclasses.replace(processor, chat=chat)
    plan = plan_data(config, SimpleNamespace(processor=lambda: counted))
    # None is so long that its length had to be known before; validation needs no rows.
    assert len(calls) == plan.samples


def test_other_parameters_of_a_folder_are_counted_from_its_files(config, folder, make_model):
    model, _ = find_model(config)
    parts = folder.family.parts
    named = make_model().named_parameters()
    others = sum(p.numel() for name, p in named if not is_in(name, [parts.language, parts.head]))
    # The files also hold tensors that the model does not use.
    assert others <= model.other_params <= 1.5 * others


def test_what_a_tower_holds():
    """SigLIP: the feed-forward part. SAM: scores of a head, or in small views those of windows."""
    siglip = TowerSizes(image_size=384, patch_size=16, width=512, inner=2048)
    assert siglip.numbers(7, 384) == 7 * 24 * 24 * (2 * 512 + 2 * 2048)
    sam = TowerSizes(image_size=1024, patch_size=16, width=256, inner=1024, heads=4, window=14)
    assert sam.numbers(1, 1024) == 4096**2 + 9 * 4096 * 256
    # 32 patches across are padded to 42, three windows.
    assert sam.numbers(2, 512) == 2 * (4 * 9 * 196**2 + (32 * 32 + 9 * 42 * 42) * 256)


def test_the_images_that_are_counted_are_those_of_a_batch():
    assert memory.PIXELS_AT_ONCE == batches.PIXELS_AT_ONCE


def test_the_batches_of_the_data_are_planned(config, folder, processor):
    encoding = plan_data(config, folder).encoding
    train, val = load_data(config, processor)
    images = [image for image in distinct_images((train, val)) if not image.drawn]
    cut = batches.cut_batches(images, processor)
    sizes = [Counter() for _ in cut]
    for batch, found in zip(cut, sizes, strict=True):
        for image in batch:
            for view in processor.pixels.sizes(image.tiles):
                found[view[1]] += view[0]
    for number, side in encoding.views:
        assert number == max(found[side] for found in sizes)
    assert {side for _, side in encoding.views} == {side for found in sizes for side in found}
    assert encoding.decoded == min(len(cut), batches.batches_ahead())


def test_the_logits_that_are_counted_are_those_of_a_chunk_of_the_loss():
    assert LOSS_POSITIONS == CHUNK


def peak(config, model):
    return estimate_memory(model, memory_spec(config, model)).peak


class TestVerdict:
    def test_the_flags_that_it_names_make_the_run_fit(self):
        config = PlanConfig(model="deepseek-ai/deepseek-vl2-small", gpu="24GB")
        model, _ = find_model(config)
        assert "does not fit on 24GB" in verdict(config, model)
        assert "fits with --quantize nf4 (" in verdict(config, model)
        fitting = dataclasses.replace(config, quantize="nf4")
        assert peak(fitting, model) < 24 * GIB
        assert verdict(fitting, model).startswith("fits on 24GB")

    def test_no_flag_makes_the_run_fit(self):
        config = PlanConfig(model="deepseek-ai/deepseek-vl2", gpu="8GB")
        model, _ = find_model(config)
        assert verdict(config, model).endswith("no flag makes it fit")

    def test_smaller_settings_take_less_memory(self):
        config = PlanConfig(model="deepseek-ai/deepseek-vl-7b-chat", gradient_checkpointing=False)
        model, _ = find_model(config)
        tried = dict(smaller_settings(config))
        assert "--gradient-checkpointing --quantize nf4 --tokens-per-microbatch 1024" in tried
        for flags, changed in tried.items():
            assert peak(changed, model) < peak(config, model), flags

    @pytest.mark.parametrize(
        ("gpu", "recomputes", "tokens"),
        [("24GB", True, 8192), ("40GB", False, 4096), ("80GB", False, 8192)],
    )
    def test_checkpointing_is_planned_as_the_run_chooses_it(self, gpu, recomputes, tokens):
        config = PlanConfig(model="deepseek-ai/deepseek-vl-7b-chat", gpu=gpu)
        model, _ = find_model(config)
        spec = memory_spec(config, model)
        assert (spec.checkpointing, spec.tokens) == (recomputes, tokens)
        assert verdict(config, model).startswith(f"fits on {gpu}")

    @pytest.mark.parametrize(
        ("longest_sample", "longest_row", "recomputes", "tokens"),
        [(700, 8000, False, 4096), (700, 2500, False, 2500), (7500, 8000, True, 8000)],
    )
    def test_checkpointing_is_planned_from_the_rows_of_the_data(
        self, longest_sample, longest_row, recomputes, tokens
    ):
        """A row is never shorter than the longest sample, whatever its limit."""
        config = PlanConfig(model="deepseek-ai/deepseek-vl-7b-chat", gpu="40GB")
        model, _ = find_model(config)
        counts = dict.fromkeys((field.name for field in dataclasses.fields(DataPlan)), 1)
        lengths = {"longest_sample": longest_sample, "longest_row": longest_row, "encoding": None}
        spec = memory_spec(config, model, DataPlan(**{**counts, **lengths}))
        assert (spec.checkpointing, spec.tokens) == (recomputes, tokens)

    @pytest.mark.parametrize(
        ("gpu", "gib"),
        [
            *(("24GB", 24), ("80 gib", 80), ("H100", 80), ("16", 16), ("288GB", 288)),
            *(("4090", 24), ("rtx4090", 24), ("RTX 4090", 24), ("NVIDIA GeForce RTX 5090", 32)),
            *(("A100-40GB", 40), ("a100 40gb", 40), ("RTX A6000", 48)),
        ],
    )
    def test_memory_of_a_gpu_by_its_name_or_size(self, gpu, gib):
        assert gpu_gib(gpu) == gib

    @pytest.mark.parametrize("gpu", ["fast", "", "0GB", "-3", "4080", "300", "rtx"])
    def test_an_unknown_gpu(self, gpu):
        with pytest.raises(ConfigError, match=r"--gpu: found .*\n.*a size like 24GB, or t4"):
            gpu_gib(gpu)


@only_siglip
def test_a_plan_is_printed(config, capsys):
    run_plan(config)
    text = capsys.readouterr().out
    for word in ("samples ", "images", "after sharing", "rows in 3 steps", "of main memory"):
        assert word in text


def test_the_overview_imports_no_model_library(tmp_path):
    """Nothing heavy is imported, so that the command answers at once."""
    code = (
        "import sys; sys.argv = ['vlft', 'plan', '--gpu', 'a100']\n"
        "from vlft.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert not {'transformers.modeling_utils', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(known.id in done.stdout for known in PUBLISHED_MODELS)


def test_a_plan_for_the_cpu_does_not_mention_gpus(capsys):
    run_plan(PlanConfig(device="cpu"))
    text = capsys.readouterr().out
    assert "LoRA on" not in text
    assert "fits" not in text
    assert "checkpointing" not in text


@pytest.mark.parametrize(
    "settings",
    [
        {"gpu": "NVIDIA GeForce RTX 5090", "gradient_checkpointing": True},
        {"gpu": "8GB", "gradient_checkpointing": False},
        {"device": "cpu"},
    ],
)
def test_the_overview_fits_80_columns(settings, capsys):
    config = PlanConfig(**settings)
    run_plan(config)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: number for number, line in enumerate(lines)}
    for known in PUBLISHED_MODELS:
        row = lines[rows[known.id]]
        model = published_sizes(known)
        assert row.split()[1] == f"{peak(config, model) / GIB:.1f}"
        if config.device != "cpu":
            answer = verdict(config, model)
            assert row.endswith("fits") == answer.startswith("fits")
            assert row.endswith("does not fit") == answer.endswith("no flag makes it fit")


def test_plan_has_the_settings_of_sft():
    """``vlft plan`` takes every flag of ``vlft sft``."""
    names = {field.name for field in dataclasses.fields(vlft.SftConfig)}
    assert {field.name for field in dataclasses.fields(PlanConfig)} == names | {"gpu"}
