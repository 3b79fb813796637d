"""Shares of sources and weights of records: what each epoch has, and that a run keeps to it."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_rows, only_siglip, write_jsonl
from safetensors.torch import load_file
from tolerances import assert_close

import vlft
from vlft.checkpoints.runs import find_checkpoint
from vlft.config import PlanConfig
from vlft.data.mix import resolved_mix, sources_of
from vlft.errors import UsageError
from vlft.packing.draw import drawn_by_share, drawn_by_weight, quotas
from vlft.packing.schedule import Schedule
from vlft.planning.estimate import plan_data
from vlft.training import loop
from vlft.training.samples import load_data, make_planner


def counted(draw, epochs) -> Counter:
    return Counter(index for number in epochs for index in draw.epoch(number))


def by_share(shares, sizes, weights=None):
    ends = np.cumsum(sizes)
    members = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    weights = np.ones(ends[-1]) if weights is None else np.array(weights)
    return drawn_by_share(members, shares, weights, seed=7)


class TestDraw:
    def test_an_epoch_has_the_shares_exactly(self):
        draw = by_share([0.7, 0.3], [10, 90])
        for number in range(5):
            found = list(draw.epoch(number))
            assert len(found) == draw.samples == 100
            assert sum(index < 10 for index in found) == 70

    @pytest.mark.parametrize(
        ("shares", "samples", "counts"),
        [
            ((0.7, 0.3), 10, [7, 3]),
            ((1, 1, 1), 10, [4, 3, 3]),
            ((0.29, 0.71), 100, [29, 71]),
            ((5, 3), 9, [6, 3]),
        ],
    )
    def test_what_rounding_leaves_goes_to_the_largest_remainders(self, shares, samples, counts):
        assert quotas(shares, samples) == counts

    def test_nothing_repeats_before_all_of_the_source_was_drawn(self):
        draw = by_share([0.7, 0.3], [10, 90])
        first = counted(draw, [0])
        assert {first[index] for index in range(10)} == {7}
        # 30 of 90 an epoch: after three epochs each of them was there once.
        assert {counted(draw, range(3))[index] for index in range(10, 100)} == {1}
        assert {counted(draw, range(1, 4))[index] for index in range(10, 100)} <= {0, 1, 2}

    def test_the_seed_and_the_number_of_the_epoch_decide(self):
        orders = [list(by_share([1, 1], [20, 20]).epoch(number)) for number in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]
        other = drawn_by_share([np.arange(20), np.arange(20, 40)], [1, 1], np.ones(40), seed=8)
        assert list(other.epoch(0)) != orders[0]

    def test_an_epoch_has_a_record_as_often_as_its_weight_says(self):
        draw = drawn_by_weight([1, 2, 3, 1, 5], seed=3)
        for number in range(3):
            assert counted(draw, [number]) == {0: 1, 1: 2, 2: 3, 3: 1, 4: 5}

    def test_a_fraction_is_once_more_in_as_many_epochs(self):
        weights = [0.5] * 6 + [1.25] * 4 + [2.3, 0.7]
        draw = drawn_by_weight(weights, seed=3)
        assert draw.samples == 11
        one = [counted(draw, [number]) for number in range(1000)]
        for index, weight in enumerate(weights):
            counts = [found[index] for found in one]
            assert {math.floor(weight), math.ceil(weight)} == set(counts[:100])
            assert np.mean(counts) == pytest.approx(weight, abs=0.05)

    def test_a_sum_that_is_not_whole_is_kept_over_the_epochs(self):
        """Each epoch has 10 samples; a pass has 10.4."""
        draw = drawn_by_weight([0.5] * 6 + [1.25] * 4 + [2.3, 0.1], seed=3)
        assert {sum(counted(draw, [number]).values()) for number in range(20)} == {10}
        assert counted(draw, range(1000))[10] == pytest.approx(2.3 * 10000 / 10.4, rel=0.03)

    def test_small_weights_do_not_make_it_slow(self):
        draw = drawn_by_weight([1e-6] * 10, seed=0)
        assert draw.samples == 1
        assert set(counted(draw, range(200))) == set(range(10))
        mixed = by_share([1, 1], [1000, 1000], [1e-6] * 1000 + [1] * 1000)
        assert set(counted(mixed, [0]).values()) == {1}

    def test_weights_count_within_a_source(self):
        draw = by_share([1, 1], [4, 6], [3, 1, 1, 1, *[1] * 6])
        counts = counted(draw, range(60))
        assert sum(counts[index] for index in range(4)) == 300
        assert [counts[index] for index in range(4)] == [150, 50, 50, 50]

    def test_processes_find_the_same(self):
        code = (
            "import numpy as np; from vlft.packing.draw import drawn_by_share;"
            "parts = [np.arange(9), np.arange(9, 30)];"
            "d = drawn_by_share(parts, [2, 1], np.arange(30) % 3 + 0.3, 5);"
            "print([list(d.epoch(n)) for n in range(3)])"
        )
        found = [
            subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True, check=True, text=True,
                env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
            ).stdout
            for seed in "12"
        ]  # fmt: skip
        assert found[0] == found[1]
        assert found[0].count(",") > 80


class TestSchedule:
    def test_copies_of_a_sample_are_spread(self):
        """Twenty copies of each of ten samples: hardly two of one in a step of four."""
        schedule = Schedule(range(10), 4, 0, drawn_by_weight([20] * 10, 0))
        assert schedule.steps_per_epoch == 50
        steps = schedule.epoch(0)
        assert sum(map(len, steps)) == 200
        assert sum(len(set(step)) < 3 for step in steps) < 15

    def test_weights_of_one_change_nothing(self):
        groups = tuple("aabbbcdee")
        plain = Schedule(groups, 4, 1).epoch(2)
        assert sorted(index for step in plain for index in step) == list(range(9))


@pytest.fixture
def sources(tmp_path):
    """Twelve rows with images, and four of text."""
    rows = make_rows(16)
    images = write_jsonl(tmp_path / "images.jsonl", rows[:12])
    text = [{"query": f"What is {n}?", "response": f"It is {n}."} for n in range(4)]
    return images, write_jsonl(tmp_path / "text.jsonl", text)


@pytest.fixture
def config(case, sources, tmp_path):
    return vlft.SftConfig(
        model=str(case.folder),
        dataset=tuple(map(str, sources)),
        mix="0.5,0.5",
        image_root=GOLDEN / "images",
        val_ratio=0,
        output_dir=tmp_path / "output",
        batch_size=4,
        num_train_epochs=2,
        save_steps=5,
        learning_rate=1e-2,
        show_sample=False,
    )


def adapter(run):
    return load_file(find_checkpoint(run) / "adapter_model.safetensors")


@only_siglip
class TestRun:
    def test_it_goes_on_in_the_second_epoch_bit_for_bit(self, config, monkeypatch):
        """Sixteen samples an epoch in four steps; goes on after step 5 of 8."""
        seen = []
        take = loop.take_step

        def take_step(job, plans):
            seen.append(sorted(index for plan in plans for index in plan.members))
            return take(job, plans)

        monkeypatch.setattr(loop, "take_step", take_step)
        whole = vlft.sft(config)
        assert whole.step == 8
        for epoch in (seen[:4], seen[4:8]):
            drawn = Counter(index for step in epoch for index in step)
            assert sum(drawn.values()) == 16
            assert sorted(drawn[index] for index in range(12, 16)) == [2, 2, 2, 2]
        assert sorted(seen[:4]) != sorted(seen[4:8])
        expected, before = adapter(whole.run), seen[5:8]
        seen.clear()
        resumed = vlft.sft(vlft.SftConfig(resume=whole.run / "checkpoint-5", overwrite=True))
        assert resumed.step == 8
        assert seen == before
        found = adapter(whole.run)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        rows = json.loads((whole.run / "mix.json").read_text())
        assert [(row["records"], row["samples"]) for row in rows] == [(12, 8), (4, 8)]
        assert [row["share_of_samples"] for row in rows] == [0.5, 0.5]
        assert [row["images"] for row in rows] == [3, 0]
        assert not any(row["tokens_estimated"] for row in rows)

    def test_rows_of_the_drawn_samples_have_their_plain_loss(self, config, processor, make_model):
        from vlft.training.loss import PackedLoss
        from vlft.vision.encode import pixels_of

        rows = [dict(row, weight=2.5) for row in make_rows(8)]
        data = write_jsonl(config.output_dir.parent / "weighted.jsonl", rows)
        config = dataclasses.replace(config, dataset=(str(data),), mix=None, batch_size=8)
        train, _ = load_data(config, processor)
        planner = make_planner(config, processor, train, "cpu")
        assert planner.schedule.samples == 20
        model = make_model()
        loss = PackedLoss(model, processor.family)
        steps = planner.schedule.epoch(0)
        drawn = Counter(index for step in steps for index in step)
        assert set(drawn.values()) == {2, 3}
        packed = plain = 0.0
        for step in steps:
            for plan in planner.rows(step):
                row = planner.packer.row([train[index] for index in plan.members])
                packed += loss(row, pixels_of(row.images, processor)).item()
        for index, count in drawn.items():
            row = planner.packer.row([train[index]])
            plain += count * loss(row, pixels_of(row.images, processor)).item()
        assert_close(torch.tensor(packed), torch.tensor(plain), "run losses")

    def test_ranks_and_plan_have_the_drawn_samples(self, config, processor, folder):
        train, _ = load_data(config, processor)
        planners = [make_planner(config, processor, train, "cpu", size) for size in (1, 2)]
        members = [
            [sorted(i for row in planner.step(n) for i in row.members) for n in range(8)]
            for planner in planners
        ]
        assert members[0] == members[1]
        weighted = [dict(row, weight=3) for row in make_rows(8)]
        data = write_jsonl(config.output_dir.parent / "weighted.jsonl", weighted)
        settings = {"model": config.model, "image_root": config.image_root, "val_ratio": 0}
        plan = PlanConfig(**settings, dataset=(str(data),), device="cpu", batch_size=5)
        found = plan_data(plan, folder)
        assert (found.samples, found.steps) == (24, 5)
        once = write_jsonl(data.with_name("once.jsonl"), make_rows(8))
        single = plan_data(dataclasses.replace(plan, dataset=(str(once),)), folder)
        assert found.tokens == 3 * single.tokens

    def test_weight_0_is_left_out_and_said(self, config, processor, sources, capsys):
        rows = [dict(row, weight=0 if number % 3 else 1) for number, row in enumerate(make_rows(9))]
        data = write_jsonl(sources[0].with_name("zero.jsonl"), rows)
        config = dataclasses.replace(config, dataset=(str(data),), mix=None, val_ratio=0.3)
        train, val = load_data(config, processor)
        assert len(train) + len(val) == 3
        left = "6 samples have weight 0 and are left out of training and validation"
        assert left in capsys.readouterr().err
        write_jsonl(data, [dict(row, weight=0) for row in rows])
        with pytest.raises(UsageError, match="9 samples have weight 0, and there is no other"):
            load_data(config, processor)

    @pytest.mark.parametrize("value", [-1, 100.5, "many", True, [1], float("nan"), 10**400])
    def test_weights_that_are_none(self, config, processor, sources, value):
        rows = make_rows(8)
        rows[4]["weight"] = value
        data = write_jsonl(sources[0].with_name("bad.jsonl"), rows)
        config = dataclasses.replace(config, dataset=(str(data),), mix=None)
        with pytest.raises(UsageError, match=r'bad.jsonl:5: "weight" is .*numbers from 0 to 100'):
            load_data(config, processor)

    def test_cells_of_csv_are_weights(self, config, processor, tmp_path):
        data = tmp_path / "w.csv"
        data.write_text("query,response,weight\na,b,0.5\nc,d,\ne,f,2\n")
        config = dataclasses.replace(config, dataset=(str(data),), mix=None)
        train, _ = load_data(config, processor)
        assert train.store.weights.tolist() == [0.5, 1, 2]

    def test_a_source_without_a_sample_is_named(self, config, processor, sources):
        write_jsonl(sources[1], [{"query": "q", "response": "r", "weight": 0}])
        with pytest.raises(UsageError, match=r"text\.jsonl: no training sample, and --mix wants"):
            load_data(config, processor)
        write_jsonl(sources[1], [{"query": "q", "response": "r"}])
        rare = dataclasses.replace(config, mix="1,0.001")
        with pytest.raises(UsageError, match=r"text\.jsonl: --mix 1,0\.001 gives an epoch of 13"):
            load_data(rare, processor)


class TestSources:
    @pytest.mark.parametrize(
        ("mix", "message"),
        [
            ("0.7", "--mix 0.7: found 1 number for 2 sources"),
            ("0.5,0.3,0.2", "found 3 numbers for 2 sources"),
            ("0.7,0", "'0', numbers above 0"),
            ("0.7,-1", "'-1', numbers above 0"),
            ("0.7,nan", "'nan', numbers above 0"),
            ("0.7,inf", "'inf', numbers above 0"),
            ("0.7,", "'', numbers above 0"),
            ("0.7,a", "'a', numbers above 0"),
            ("0.7,0.3x", "'0.3x', numbers above 0"),
            ("0.7,0.3x2", "found 2 numbers for 2 sources"),
        ],
    )
    def test_numbers_that_do_not_fit(self, mix, message):
        with pytest.raises(UsageError, match=message):
            sources_of(["a.jsonl", "b.jsonl"], mix)

    def test_one_source_is_not_mixed(self):
        with pytest.raises(UsageError, match="there is 1 source; nothing is mixed"):
            sources_of(["a.jsonl"], "1")

    def test_a_pattern_is_one_source_also_in_the_saved_settings(self, tmp_path):
        for name in ("a", "b", "c"):
            (tmp_path / f"{name}.jsonl").touch()
        given = [f"{tmp_path}/[ab].jsonl#5", f"{tmp_path}/c.jsonl"]
        one, other = sources_of(given, "0.7,0.3")
        assert (len(one.files), one.first, one.share) == (2, 0, 0.7)
        assert (len(other.files), other.first, other.share) == (1, 2, 0.3)
        saved = resolved_mix(given, "0.7,0.3")
        assert saved == "0.7x2,0.3"
        files = [*one.files, *other.files]
        assert sources_of(files, saved) == [one, other]
        assert resolved_mix(files, saved) == saved
