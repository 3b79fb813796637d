"""``--label-loss`` and the metric perplexity: the exponential of the plain loss."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl
from served import make_adapter
from torch.nn import functional as F

import vlft
from vlft.data.images import inspect_image
from vlft.data.options import Reading
from vlft.data.read import read_row
from vlft.errors import DataError
from vlft.inference.generate import Sampling
from vlft.inference.replier import Replier, Reply

REPLY = Reply("", [], "stop")


def plain_loss(model, processor, row) -> tuple[float, int]:
    """Of all logits and the labels, for a record of one turn."""
    sample = processor.encode(row, GOLDEN / "images")
    batch = processor.collate([sample])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    loss = F.cross_entropy(logits[0, :-1].float(), labels[0, 1:])
    return float(loss), int((sample.labels != -100).sum())


def conversation_of(row, processor):
    """The record, its images inspected."""
    reading = Reading(processor.family.image_tag, False, processor.family.has_boxes)
    conversation = read_row(row, reading, GOLDEN / "images")
    return conversation.map_images(
        lambda ref: dataclasses.replace(ref, facts=inspect_image(ref.path))
    )


def test_it_is_the_plain_loss_of_each_family(case, shared_model, processor):
    replier = Replier(shared_model, processor, Sampling(1))
    for row in make_rows(6, case)[:2]:
        conversation = conversation_of(row, processor)
        loss = replier.with_loss(REPLY, conversation).loss
        expected, tokens = plain_loss(shared_model, processor, row)
        assert loss.nats == pytest.approx(expected, rel=1e-5)
        assert loss.tokens == tokens


@pytest.mark.only_siglip
class TestCommand:
    def test_the_exponential_of_the_mean_over_tokens(self, tmp_path, case, processor, shared_model):
        rows = [row for row in make_rows(8) if "history" not in row][:5]
        file = write_jsonl(tmp_path / "ask.jsonl", rows)
        given = {
            "model": str(case.folder), "dataset": (str(file),), "image_root": GOLDEN / "images",
            "max_new_tokens": 1, "show_samples": 0, "device": "cpu",
            "output": tmp_path / "answers.jsonl",
        }  # fmt: skip
        found = vlft.evaluate(vlft.EvalConfig(**given, metric=("perplexity",)))
        losses = [plain_loss(shared_model, processor, row) for row in rows]
        tokens = sum(count for _, count in losses)
        mean = sum(loss * count for loss, count in losses) / tokens
        summary = found.summary["metrics"]["perplexity"]
        assert summary["scores"][0]["mean"] == pytest.approx(math.exp(mean), rel=1e-5)
        low, high = summary["scores"][0]["interval"]
        assert low <= summary["scores"][0]["mean"] <= high
        scored = [json.loads(line) for line in found.scores[0].read_text().splitlines()]
        for row, (loss, count) in zip(scored, losses, strict=True):
            assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
            assert row["perplexity_weight"] == count
        header = json.loads((tmp_path / "answers.settings.json").read_text())
        assert header["settings"]["label_loss"] is True

    def test_two_models_and_the_table(self, tmp_path, case, capsys):
        file = write_jsonl(tmp_path / "ask.jsonl", make_rows(8)[:4])
        adapter = make_adapter(SIGLIP.folder, tmp_path / "adapter", 1)
        given = {
            "dataset": (str(file),), "image_root": GOLDEN / "images", "max_new_tokens": 1,
            "show_samples": 0, "device": "cpu", "label_loss": True,
        }  # fmt: skip
        files = []
        for name, model in (("a", {"model": str(case.folder)}), ("b", {"ckpt_dir": (adapter,)})):
            output = tmp_path / f"{name}.jsonl"
            files.append(vlft.infer(vlft.InferConfig(**given, **model, output=output)).output)
        capsys.readouterr()
        config = vlft.EvalConfig(results=tuple(files), metric=("perplexity", "cer"))
        summary = vlft.evaluate(config).summary
        base, tuned = (one["mean"] for one in summary["metrics"]["perplexity"]["scores"])
        difference = summary["metrics"]["perplexity"]["difference"]
        assert base != tuned
        assert difference["mean"] == pytest.approx(tuned - base)
        out = capsys.readouterr().out
        shown = f"{base:.1f} +{tuned:.1f} +\\{difference['mean']:+.1f}"
        assert re.search(rf"^perplexity +{shown} ", out, re.M)
        assert "4 pairs; all but perplexity and p in per cent" in out

    def test_a_file_without_losses(self, tmp_path):
        row = {"query": "", "response": "a", "label": "b", "images": []}
        path = write_jsonl(tmp_path / "plain.jsonl", [row])
        with pytest.raises(DataError, match="has no loss: let vlft infer answer with --label-loss"):
            vlft.evaluate(vlft.EvalConfig(results=(path,), metric=("perplexity",)))
