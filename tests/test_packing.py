"""The packed row computes what one sample at a time computes: loss and every gradient."""

from __future__ import annotations

import itertools
import random
import warnings
from dataclasses import replace
from itertools import groupby, islice, pairwise

import pytest
import torch
from conftest import GOLDEN, OCR2, ONE_EACH, make_rows, without_ocr2
from tolerances import assert_close
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vlft.config import JOINED_TOKENS
from vlft.data.encode import EncodedImage, EncodedSample
from vlft.data.outline import outline
from vlft.models import tree_attention as attention
from vlft.models.tree_attention import Block, fused_attention, tree_attention
from vlft.packing.attention import (
    BLOCK,
    additive_mask,
    block_mask,
    find_blocks,
    find_segments,
    kept_attention,
    row_attention,
    tree_mask,
)
from vlft.packing.packer import Packer
from vlft.packing.planner import Planner
from vlft.packing.prefix_tree import common_prefix, pack
from vlft.packing.schedule import Schedule, divide
from vlft.training.lora import LoraOptions, add_lora
from vlft.training.loss import PackedLoss
from vlft.vision.encode import pixels_of

IMAGE = 99


def sample(tokens: str, labels: str = "", images: tuple[EncodedImage, ...] = ()) -> EncodedSample:
    """A sample of a token per letter; ``#`` is an image token, ``^`` marks a trained token."""
    ids = torch.tensor([IMAGE if c == "#" else ord(c) - ord("a") for c in tokens])
    marks = torch.tensor([c == "^" for c in labels.ljust(len(tokens))])
    return EncodedSample(ids, torch.where(marks, ids, -100), tokens, images)


def packer(**options) -> Packer:
    defaults = {"image_token_id": IMAGE, "joined_tokens": JOINED_TOKENS["cpu"]}
    return Packer(**{**defaults, **options})


def image(key: str, tokens: int = 2) -> EncodedImage:
    return EncodedImage(GOLDEN / "images" / "photo_a.jpg", key, tokens)


def letters(row) -> str:
    return "".join("#" if i == IMAGE else chr(i + ord("a")) for i in row.input_ids[0].tolist())


class TestTree:
    def test_the_drawing(self):
        row = pack([sample("sab"), sample("sac"), sample("sd")], IMAGE)
        assert letters(row) == "sabcd"
        assert row.position_ids.tolist() == [[0, 1, 2, 2, 1]]
        assert row.exit.tolist() == [5, 4, 3, 4, 5]
        assert (row.samples, row.sample_tokens) == (3, 8)

    def test_order_of_samples_does_not_matter(self):
        samples = [sample("abc", " ^^"), sample("abd", "  ^"), sample("xyz", " ^^")]
        rows = [pack([samples[i] for i in order], IMAGE) for order in ((0, 1, 2), (2, 0, 1))]
        assert letters(rows[0]) == letters(rows[1])
        assert torch.equal(rows[0].source, rows[1].source)

    def test_a_prefix_of_another_sample(self):
        row = pack([sample("ab", " ^"), sample("abcd", "  ^^")], IMAGE)
        assert letters(row) == "abcd"
        assert list(zip(row.source.tolist(), row.target.tolist(), strict=True)) == [
            (0, 1),
            (1, 2),
            (2, 3),
        ]

    def test_repeats_weigh_more_and_branches_have_a_target_each(self):
        row = pack([sample("ab", " ^"), sample("ab", " ^"), sample("ac", " ^")], IMAGE)
        targets = zip(row.source.tolist(), row.target.tolist(), row.weight.tolist(), strict=True)
        assert list(targets) == [(0, 1, 2.0), (0, 2, 1.0)]

    def test_the_same_tokens_trained_by_one_and_not_by_the_other(self):
        row = pack([sample("abc", " ^^"), sample("abd", "  ^")], IMAGE)
        assert row.weight.tolist() == [1.0, 1.0, 1.0]

    def test_without_sharing_every_sample_is_a_tree(self):
        row = pack([sample("ab", " ^"), sample("ab", " ^")], IMAGE, share=False)
        assert letters(row) == "abab"
        assert row.exit.tolist() == [2, 2, 4, 4]
        assert row.weight.tolist() == [1.0, 1.0]

    def test_images_are_shared_by_content(self):
        one, other = image("one"), image("other")
        row = pack(
            [
                sample("s##a", images=(one,)),
                sample("s##b", images=(one,)),
                sample("s##a", images=(other,)),
            ],
            IMAGE,
        )
        assert sorted(len(part) for part in letters(row).split("s")) == [0, 7]
        assert row.image_positions.tolist() == [i for i, c in enumerate(letters(row)) if c == "#"]
        assert len(row.images) == 2
        assert sorted(row.feature_rows.tolist()) == [0, 1, 2, 3]

    def test_one_image_in_two_places_is_encoded_once(self):
        one = image("one")
        row = pack([sample("a##", images=(one,)), sample("b##", images=(one,))], IMAGE)
        assert row.images == (one,)
        assert row.feature_rows.tolist() == [0, 1, 0, 1]

    def test_the_mask_is_the_set_of_ancestors(self):
        generator = random.Random(0)
        words = ["".join(generator.choices("ab", k=generator.randint(1, 6))) for _ in range(12)]
        row = pack([sample(word) for word in words], IMAGE)
        mask = tree_mask(row.exit)[0, 0]
        assert len(row) == len({word[:end] for word in words for end in range(1, len(word) + 1)})
        text = letters(row)
        paths = []
        for j in range(len(row)):
            seen = mask[j].nonzero().squeeze(1).tolist()
            assert row.position_ids[0, seen].tolist() == list(range(len(seen)))
            paths.append("".join(text[i] for i in seen))
        assert set(paths) == {word[:end] for word in words for end in range(1, len(word) + 1)}

    @pytest.mark.parametrize(
        ("left", "right", "length"), [("abc", "abd", 2), ("", "a", 0), ("ab", "ab", 2)]
    )
    def test_common_prefix(self, left, right, length):
        assert common_prefix([*map(ord, left)], [*map(ord, right)]) == length


def random_row(words: int, seed: int = 0):
    """A packed row with shared prefixes of several lengths and long branches."""
    generator = random.Random(seed)
    return pack(
        [
            sample(
                "".join(generator.choices("ab", k=generator.randint(1, 9)))
                + "".join(generator.choices("cdefgh", k=generator.randint(1, 200)))
            )
            for _ in range(words)
        ],
        IMAGE,
    )


class TestAttention:
    @pytest.mark.parametrize("words", [1, 2, 7, 40])
    @pytest.mark.parametrize("heads", [4, 2])
    @pytest.mark.parametrize("fused", [False, True])
    def test_by_segments_as_with_the_dense_mask(self, words, heads, fused):
        """Output and gradients, also with grouped-query attention."""
        torch.manual_seed(0)
        row = random_row(words)
        sizes = [(1, count, len(row), 8) for count in (4, heads, heads)]
        inputs = [torch.randn(size, requires_grad=True) for size in sizes]
        query, key, value = inputs
        repeated = (part.repeat_interleave(4 // heads, 1) for part in (key, value))
        plain = torch.nn.functional.scaled_dot_product_attention(
            query, *repeated, attn_mask=tree_mask(row.exit)
        )
        blocks = row_attention(row.segments, row.exit, torch.float32, fused=fused)
        if fused:
            found = fused_attention(blocks, query, key, value, scaling=8**-0.5)
        else:
            found, _ = tree_attention(torch.nn.Module(), query, key, value, None, row=blocks)
        assert_close(found.transpose(1, 2), plain, "layer")
        weights = torch.randn_like(plain)
        expected = torch.autograd.grad((plain * weights).sum(), inputs)
        gradients = torch.autograd.grad((found.transpose(1, 2) * weights).sum(), inputs)
        assert_close(gradients, expected, "layer gradients")

    @pytest.mark.parametrize("words", [1, 7, 40])
    @pytest.mark.parametrize("fused", [False, True])
    def test_of_some_queries_alone(self, words, fused):
        """Output and gradients; a position may repeat, and blocks without a query are left out."""
        torch.manual_seed(0)
        row = random_row(words)
        positions = torch.randint(0, len(row), (2 * words,)).sort().values
        query = torch.randn(1, 4, len(positions), 8, requires_grad=True)
        key, value = (torch.randn(1, 4, len(row), 8, requires_grad=True) for _ in range(2))
        plain = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=tree_mask(row.exit)[:, :, positions]
        )
        blocks = row_attention(row.segments, row.exit, torch.float32, fused=fused)
        kept = kept_attention(blocks, positions, row.exit, torch.float32)
        assert len(kept) == len({i for i, b in enumerate(blocks) for p in positions.tolist()
                                 if b.block.first <= p < b.block.end})  # fmt: skip
        if fused:
            found = fused_attention(kept, query, key, value, scaling=8**-0.5)
        else:
            found, _ = tree_attention(torch.nn.Module(), query, key, value, None, row=kept)
        assert_close(found.transpose(1, 2), plain, "layer")
        weights, inputs = torch.randn_like(plain), [query, key, value]
        expected = torch.autograd.grad((plain * weights).sum(), inputs)
        gradients = torch.autograd.grad((found.transpose(1, 2) * weights).sum(), inputs)
        assert_close(gradients, expected, "layer gradients")

    def test_the_drawing(self):
        """A system prompt, two images with their prompts, and two questions on the first."""
        row = pack(
            [sample("s" * 9 + c) for c in ("i" * 99 + "a" * 5, "i" * 99 + "b" * 7, "j")], IMAGE
        )
        assert row.segments == (
            Block((), 0, 9, (9,)),
            Block(((0, 9),), 9, 108, (99,)),
            Block(((0, 108),), 108, 113, (5,)),
            Block(((0, 108),), 113, 120, (7,)),
            Block(((0, 9),), 120, 121, (1,)),
        )
        assert [*find_blocks(row.segments, queries=64, siblings=256)] == [
            row.segments[0],
            Block(((0, 9),), 9, 73, (64,)),
            Block(((0, 73),), 73, 108, (35,)),
            Block(((0, 108),), 108, 120, (5, 7)),
            row.segments[4],
        ]

    def test_separate_samples_are_roots(self):
        row = pack([sample("abc"), sample("de")], IMAGE, share=False)
        assert row.segments == (Block((), 0, 3, (3,)), Block((), 3, 5, (2,)))

    @pytest.mark.parametrize("words", [1, 7, 40, 300])
    def test_few_scores_are_computed_in_vain(self, words):
        row = random_row(words)
        needed = int((row.position_ids + 1).sum())
        blocks = [*find_blocks(row.segments, queries=64, siblings=256)]
        assert [block.first for block in blocks] == [0, *(block.end for block in blocks[:-1])]
        assert needed <= sum(block.scores for block in blocks) <= needed + 64 * len(row)

    def test_sixteen_bit_is_as_close_as_sdpa(self):
        """To the same attention in float32, output and gradients."""
        row = random_row(40)
        inputs = [torch.randn(1, 2, len(row), 16) for _ in range(3)]

        def attended(attend, dtype):
            given = [part.to(dtype).requires_grad_() for part in inputs]
            output = attend(*given)
            gradients = torch.autograd.grad(output.float().square().sum(), given)
            return [part.detach().float() for part in (output, *gradients)]

        def by_segments(*given):
            blocks = row_attention(row.segments, row.exit, given[0].dtype, fused=False)
            output, _ = tree_attention(torch.nn.Module(), *given, None, row=blocks)
            return output.transpose(1, 2)

        def dense(*given):
            mask = additive_mask(row.exit, given[0].dtype)
            return torch.nn.functional.scaled_dot_product_attention(*given, attn_mask=mask)

        expected = attended(dense, torch.float32)
        for name, *three in zip(
            ("output", "query", "key", "value"), expected, attended(dense, torch.bfloat16),
            attended(by_segments, torch.bfloat16), strict=True,
        ):  # fmt: skip
            plain, ours = (float((part - three[0]).norm()) for part in three[1:])
            assert ours <= 1.5 * plain, name

    def test_autocast_computes_in_its_dtype(self):
        """As SDPA does; gradients have the dtypes of what was given."""
        row = random_row(7)
        given = [
            torch.randn(1, 2, len(row), 16, dtype=dtype, requires_grad=True)
            for dtype in (torch.float32, torch.float32, torch.bfloat16)
        ]
        blocks = row_attention(row.segments, row.exit, torch.bfloat16, fused=False)
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = tree_attention(torch.nn.Module(), *given, None, row=blocks)
        gradients = torch.autograd.grad(output.float().square().sum(), given)
        assert output.dtype == torch.bfloat16
        assert [part.dtype for part in gradients] == [part.dtype for part in given]

    def test_rows_do_attend_by_segments(self, case, model, folder, processor, monkeypatch):
        """So that TestSameAsOneAtATime compares this attention."""
        calls = []
        original = attention.BlockAttention.weights

        def weights(block, *rest):
            calls.append(block)
            return original(block, *rest)

        monkeypatch.setattr(attention.BlockAttention, "weights", weights)
        samples = [processor.encode(row, GOLDEN / "images") for row in make_rows(5, case)]
        row = pack(samples, processor.chat.image_token_id)
        with torch.no_grad():
            PackedLoss(model, folder.family)(row, pixels_of(row.images, processor))
        blocks = row_attention(row.segments, row.exit, torch.float32, fused=False)
        kept = kept_attention(blocks, row.source, row.exit, torch.float32)
        others = model.config.text_config.num_hidden_layers - 1
        assert len(calls) == len(blocks) * others + len(kept)

    @pytest.mark.parametrize("words", [3, 40, 120])
    def test_blocks_are_those_that_torch_finds_in_the_dense_mask(self, words):
        row = random_row(words)
        found = block_mask(row.exit)
        expected = create_block_mask(
            lambda _batch, _head, query, key: tree_mask(row.exit)[0, 0][query, key],
            1, 1, len(row), len(row), device="cpu", BLOCK_SIZE=BLOCK,
        )  # fmt: skip
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)
        assert found.sparsity() == expected.sparsity()

    @pytest.mark.parametrize("more", [1, 130, 700])
    def test_padding_attends_to_itself_alone(self, more):
        row = random_row(3)
        length = len(row) + more
        found = block_mask(row.exit, None, length)
        exits = torch.arange(1, length + 1)
        exits[: len(row)] = row.exit
        expected = create_block_mask(
            lambda _batch, _head, query, key: tree_mask(exits)[0, 0][query, key],
            1, 1, length, length, device="cpu", BLOCK_SIZE=BLOCK,
        )  # fmt: skip
        assert found.seq_lengths == (length, length)
        assert torch.equal(found.to_dense(), expected.to_dense())
        assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)

    def test_flex_attention_sees_the_same(self):
        """Only its output: torch has no backward pass of it on the CPU."""
        row = random_row(7)
        query, key, value = (torch.randn(1, 2, len(row), 16) for _ in range(3))
        plain = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=additive_mask(row.exit, torch.float32)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not compiled
            found = flex_attention(query, key, value, block_mask=block_mask(row.exit))
        assert_close(found, plain, "layer")


class TestLastLayer:
    """It computes positions with targets alone; TestSameAsOneAtATime compares the output."""

    def test_its_mlp_sees_the_targets_alone(self, case, model, folder, processor):
        samples = [processor.encode(row, GOLDEN / "images") for row in make_rows(5, case)]
        row = pack(samples, processor.chat.image_token_id)
        seen = []
        layers = model.get_submodule(folder.family.parts.language).layers
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        PackedLoss(model, folder.family)(row, pixels_of(row.images, processor))
        assert seen == [len(row)] * (len(layers) - 1) + [len(row.source)]
        assert len(row.source) < 0.5 * len(row)


class TestSchedule:
    def test_every_sample_once_per_epoch_and_seeded(self):
        schedule = Schedule(tuple("aabbbcdee"), 4, seed=1)
        for number in range(3):
            steps = schedule.epoch(number)
            assert [len(step) for step in steps] == [4, 4, 1]
            assert sorted(index for step in steps for index in step) == list(range(9))
        assert schedule.epoch(0) == Schedule(tuple("aabbbcdee"), 4, seed=1).epoch(0)
        assert schedule.epoch(0) != schedule.epoch(1)
        assert schedule.epoch(0) != Schedule(tuple("aabbbcdee"), 4, seed=2).epoch(0)

    def test_groups_stay_together_and_are_shuffled_inside(self):
        groups = tuple(index // 5 for index in range(50))
        orders = [
            [index for step in Schedule(groups, 16, 3).epoch(number) for index in step]
            for number in range(3)
        ]
        for order in orders:
            seen = [groups[index] for index in order]
            assert sum(a != b for a, b in pairwise(seen)) == 9
        inside = [[index for index in order if groups[index] == 4] for order in orders]
        assert len(set(map(tuple, inside))) == 3

    def test_a_large_group_is_spread_over_the_epoch(self):
        """Sixty samples on one blank image among sixty with images of their own."""
        groups = (*range(60), *["blank"] * 60)
        for seed in range(5):
            steps = Schedule(groups, 16, seed).epoch(0)
            counts = [sum(groups[index] == "blank" for index in step) for step in steps]
            assert sum(counts) == 60
            assert sum(count > 0 for count in counts) >= 4
            longest = max(
                len(list(run))
                for blank, run in groupby(
                    groups[index] == "blank" for step in steps for index in step
                )
                if blank
            )
            assert longest < 40

    def test_samples_of_one_image_alone_come_in_any_order(self):
        """A step holds many different answers even if the file is sorted by answer."""
        steps = Schedule(("reference",) * 100, 16, seed=0).epoch(0)
        assert all(max(step) - min(step) > 30 for step in steps[:-1])
        assert steps != Schedule(("reference",) * 100, 16, seed=0).epoch(1)

    def test_going_on_in_the_middle_is_going_on(self):
        outlines = [outline(sample("ab"), IMAGE)] * 10
        limited = packer(tokens_per_row=4096)
        planner = Planner(Schedule(tuple(range(10)), 4, seed=0), limited, outlines)
        steps = list(islice(planner.steps(), 8))
        assert list(islice(planner.steps(5), 3)) == steps[5:]
        members = [index for step in steps[:3] for row in step for index in row.members]
        assert sorted(members) == list(range(10))

    @pytest.mark.parametrize("share", [True, False])
    @pytest.mark.parametrize("limit", [1, 5, 7, 12, 1000])
    def test_rows_hold_all_samples_and_keep_the_limit(self, share, limit):
        samples = [sample(word) for word in ("aab", "aac", "aad", "bcdef", "b", "ccccc")]
        rows = packer(tokens_per_row=limit, share_prefix=share).rows(samples)
        assert sum(row.samples for row in rows) == 6
        assert all(len(row) <= limit or row.samples == 1 for row in rows)
        if limit == 1000:
            assert len(rows) == 1

    def test_unrelated_samples_are_joined_only_while_the_row_is_small(self):
        related = [sample("a" * 1500 + end) for end in "bc"]
        rows = packer(tokens_per_row=4096).rows([*related, sample("d" * 700), sample("e" * 200)])
        assert sorted(len(row) for row in rows) == [900, 1502]

    def test_sharers_go_into_one_row(self):
        samples = [sample("aaaa" + end) for end in "bcd"] + [sample("eeeee")]
        rows = packer(tokens_per_row=7).rows(samples)
        assert sorted(row.samples for row in rows) == [1, 3]

    @pytest.mark.parametrize("share", [True, False])
    @pytest.mark.parametrize("limit", [5, 9, 40, 2000])
    def test_what_is_planned_is_what_is_packed(self, share, limit):
        generator = random.Random(limit)
        for _ in range(20):
            words = ["".join(generator.choices("ab", k=generator.randint(1, 8))) for _ in range(9)]
            samples = [sample(word) for word in words]
            plans = packer(tokens_per_row=limit, share_prefix=share).plan(
                [outline(sample, IMAGE) for sample in samples]
            )
            rows = packer(tokens_per_row=limit, share_prefix=share).rows(samples)
            assert [plan.tokens for plan in plans] == [len(row) for row in rows]
            assert sorted(i for plan in plans for i in plan.members) == list(range(9))

    def test_rows_are_even_and_the_longest_comes_first(self):
        """Nine questions on an image, of which a row could hold eight: not eight and one."""
        samples = [sample("a" * 100 + letter * 10) for letter in "bcdefghij"]
        rows = packer(tokens_per_row=180).rows(samples)
        assert [(row.samples, len(row)) for row in rows] == [(5, 150), (4, 140)]

    def test_several_processes_get_a_row_each(self):
        samples = [sample("a" * 100 + letter * 10) for letter in "bcdef"]
        assert len(packer(tokens_per_row=4096).rows(samples)) == 1
        rows = packer(tokens_per_row=4096, world_size=2).rows(samples)
        assert [row.samples for row in rows] == [3, 2]
        assert len(packer(tokens_per_row=4096, world_size=2).rows(samples[:1])) == 1

    @pytest.mark.parametrize("processes", [1, 2, 3, 8])
    def test_processes_share_the_cost(self, processes):
        generator = random.Random(processes)
        costs = [generator.randint(1, 100) for _ in range(processes * 6)]
        shares = divide(costs, processes)
        assert sorted(index for share in shares for index in share) == list(range(len(costs)))
        assert {len(share) for share in shares} == {6}
        sums = [sum(costs[index] for index in share) for share in shares]
        assert max(sums) - min(sums) <= 0.15 * max(sums)


# Loss and gradients of one sample at a time, by checkpoint.
SINGLE: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}
# OCR-2 takes seconds a page, so that it has one of the four.
SAME = [
    *itertools.product(
        [case for case in ONE_EACH if case is not OCR2], [150, 100_000], [True, False]
    ),
    (OCR2, 100_000, True),
]


class TestSameAsOneAtATime:
    """Loss and every LoRA gradient, float32."""

    @pytest.fixture
    def samples(self, case, processor):
        return [processor.encode(row, GOLDEN / "images") for row in make_rows(case.rows, case)]

    @pytest.fixture
    def objective(self, model, folder):
        torch.manual_seed(0)
        options = LoraOptions("ALL", rank=4, train_aligner=True, train_vision=True)
        add_lora(model, folder.family, options)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return PackedLoss(model, folder.family)

    def gradients(self, objective, processor, rows):
        objective.zero_grad()
        weight = sum(row.weight.sum() for row in rows)
        total = 0.0
        for row in rows:
            loss = objective(row, pixels_of(row.images, processor)) / weight
            loss.backward()
            total += loss.item()
        trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        return total, {name: p.grad.clone() for name, p in trained.items()}

    @pytest.fixture
    def alone(self, case, objective, processor, samples):
        """Plain cross-entropy on all logits of the model class, one sample at a time."""
        if case.checkpoint not in SINGLE:
            SINGLE[case.checkpoint] = self.one_by_one(objective, processor, samples)
        return SINGLE[case.checkpoint]

    def one_by_one(self, objective, processor, samples):
        objective.zero_grad()
        total, count = 0.0, sum(int((s.labels[1:] != -100).sum()) for s in samples)
        for item in samples:
            inputs = processor.collate([item])
            labels = inputs.pop("labels")
            logits = objective.model(**inputs).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        return total, {name: p.grad.clone() for name, p in trained.items()}

    @pytest.mark.parametrize(("case", "limit", "share"), SAME, indirect=["case"], ids=str)
    def test_same(self, objective, processor, samples, alone, share, limit):
        token = processor.chat.image_token_id
        rows = packer(tokens_per_row=limit, share_prefix=share, image_token_id=token).rows(samples)
        loss, gradients = self.gradients(objective, processor, rows)
        assert len(gradients) > 50
        assert_close(loss, alone[0], "loss")
        assert_close(gradients, alone[1], "gradients")

    def test_sharing_saves_and_repeats_weigh(self, processor, samples):
        token = processor.chat.image_token_id
        row = pack(samples, token)
        assert len(row) < 0.6 * row.sample_tokens
        assert row.weight.max() >= 2

    @without_ocr2
    def test_a_wrong_mask_is_seen(self, objective, processor, samples, alone):
        """The comparison above can fail: let each token see the whole row before it."""
        row = pack(samples, processor.chat.image_token_id)
        open_row = replace(row, segments=find_segments([len(row)] * len(row)))
        loss, _ = self.gradients(objective, processor, [open_row])
        assert abs(loss - alone[0]) > 1e-3
