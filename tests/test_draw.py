"""Drawing: the authors' codes and images, and what a batch, a seed and a prompt may change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN, JANUS, JANUS_PRO, ONE_EACH
from safetensors.torch import load_file
from tolerances import assert_close

import vlft
from vlft.data.drawing import unconditional
from vlft.data.images import decoded
from vlft.errors import ConfigError, DataError, UsageError
from vlft.inference import draw
from vlft.inference import guided as sampling
from vlft.inference.draw import cut_batches, orders_of
from vlft.inference.guided import Guidance, Order, draw_codes

BOTH = pytest.mark.parametrize("case", [JANUS, JANUS_PRO], indirect=True, scope="session", ids=str)
ONE = pytest.mark.parametrize("case", [JANUS_PRO], indirect=True, scope="session", ids=str)
PROMPTS = ["a red square", "a small blue circle on white", "grey"]


@BOTH
class TestGolden:
    @pytest.fixture
    def data(self, case):
        return json.loads((case.cases / "t2i.json").read_text("utf-8"))

    @pytest.fixture
    def expected(self, case):
        return load_file(case.cases / "t2i.safetensors")

    @pytest.fixture
    def generator(self, folder):
        return folder.family.generator

    def test_prompts(self, data, expected, processor, monkeypatch):
        """Conditional and unconditional, with the authors' text."""
        seen = []
        monkeypatch.setattr(draw, "draw_batch", lambda m, p, batch, g: seen.append(batch) or [])
        vlft.draw(None, processor, data["conversation"][0]["content"])
        ((prompt, _),) = seen[0]
        assert prompt.text == data["sft_format"]
        rows = [prompt.input_ids, unconditional(prompt, processor.chat).input_ids]
        assert torch.equal(torch.stack(rows), expected["tokens"].long())

    def test_greedy_codes_and_image(self, data, expected, processor, shared_model):
        (drawing,) = vlft.draw(
            shared_model, processor, data["conversation"][0]["content"], temperature=0
        )
        assert drawing.codes.dtype == torch.int64
        assert torch.equal(drawing.codes, expected["vq_ids"][0].long())
        found = np.asarray(drawing.image)[::2, ::2].astype(int)
        assert abs(found - expected["decoded_generated_u8"][0].numpy().astype(int)).max() <= 1

    def test_scores(self, data, expected, processor, shared_model, monkeypatch):
        """Conditional, unconditional and guided, of the first four codes."""
        seen, guided = [], sampling._guided

        def noted(scores, guidance):
            made = guided(scores, guidance)
            seen.append(torch.cat([scores, made]))
            return made

        monkeypatch.setattr(sampling, "_guided", noted)
        vlft.draw(shared_model, processor, data["conversation"][0]["content"], temperature=0)
        found = torch.stack(seen[:4])[..., ::4]
        assert_close(found, expected["first4_logits_cond_uncond_cfg"], "golden logits")

    def test_fixed_codes(self, expected, generator, shared_model):
        codes = expected["fixed_codes"].long()
        with torch.no_grad():
            image = generator.decode(shared_model, codes)[..., ::4, ::4]
            embedded = generator.embed(shared_model, codes)[..., ::4]
        assert_close(image, expected["decoded_fixed"], "golden features")
        assert_close(embedded, expected["gen_embeds_fixed"], "golden features")

    def test_encoding(self, data, expected, processor, generator, shared_model):
        """The codes of an image, and its reconstruction from them."""
        with decoded(GOLDEN / data["vq_encode_image"], rotate=False) as rgb:
            (pixels,) = processor.pixels.transform(rgb, (0, 0))
        with torch.no_grad():
            codes = generator.encode(shared_model, pixels)
            image = generator.decode(shared_model, codes)[..., ::4, ::4]
        assert torch.equal(codes, expected["vq_encode_ids"].long())
        assert_close(image, expected["vq_reconstruction"], "golden features")


@ONE
class TestBatches:
    def codes(self, shared_model, processor, prompts=PROMPTS, **settings):
        drawn = vlft.draw(shared_model, processor, prompts, **settings)
        return torch.stack([drawing.codes for drawing in drawn])

    def test_an_image_does_not_depend_on_the_others(self, shared_model, processor):
        together = self.codes(shared_model, processor, num_images=3)
        assert torch.equal(
            together, self.codes(shared_model, processor, num_images=3, batch_size=4)
        )
        fewer = self.codes(shared_model, processor, num_images=1)
        assert torch.equal(together[::3], fewer)
        assert len(torch.unique(together, dim=0)) == 9

    def test_padding_changes_nothing(self, shared_model, processor):
        """Prompts of unequal length in one batch, each as if it were alone; greedily."""
        together = self.codes(shared_model, processor, temperature=0)
        alone = [self.codes(shared_model, processor, [p], temperature=0)[0] for p in PROMPTS]
        assert torch.equal(together, torch.stack(alone))

    def test_seeds(self, shared_model, processor):
        first, again, other = (
            self.codes(shared_model, processor, ["a red square"], seed=s) for s in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_without_guidance_only_the_prompt_runs(self, shared_model, processor):
        rows = []
        embed = processor.family.generator.embed
        language = shared_model.model.language_model
        hook = language.register_forward_pre_hook(
            lambda m, args, given: rows.append(len(given["inputs_embeds"])), with_kwargs=True
        )
        try:
            plain = self.codes(shared_model, processor, ["red"], cfg_weight=1, temperature=0)
        finally:
            hook.remove()
        assert set(rows) == {1}
        assert embed is not None
        assert not torch.equal(plain, self.codes(shared_model, processor, ["red"], temperature=0))

    def test_each_prompt_runs_once_for_all_its_images(self, shared_model, processor):
        rows = []
        hook = shared_model.model.register_forward_pre_hook(
            lambda m, args, given: rows.append(given["input_ids"]), with_kwargs=True
        )
        try:
            self.codes(shared_model, processor, ["red", "big blue circle"], num_images=4)
        finally:
            hook.remove()
        # Two prompts, and the unconditional ones of their two lengths.
        assert [len(ids) for ids in rows] == [4]

    def test_low_temperatures_are_greedy(self, shared_model, processor):
        cold = self.codes(shared_model, processor, ["red"], temperature=1e-30)
        assert torch.equal(cold, self.codes(shared_model, processor, ["red"], temperature=0))

    def test_an_image_in_the_prompt_is_seen(self, shared_model, processor):
        rows = [
            {"query": "<image>Make it blue.", "images": [f"images/{name}"]}
            for name in ("photo_a.jpg", "photo_b.jpg")
        ]
        given = {"temperature": 0, "image_root": GOLDEN}
        together = self.codes(shared_model, processor, rows, **given)
        alone = [self.codes(shared_model, processor, [row], **given)[0] for row in rows]
        assert torch.equal(together, torch.stack(alone))
        assert not torch.equal(together[0], together[1])

    def test_sampling_follows_the_scores(self, processor, shared_model):
        """The share of first codes among many samples is the softmax of the guided scores."""
        seen = []
        prompt = draw._encode("red", processor, None)
        few, generator = 40, processor.family.generator
        order = [Order(prompt, range(few))]
        original = sampling._guided

        def noted(scores, guidance):
            seen.append(original(scores, guidance))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "_guided", noted)
            with torch.inference_mode():
                codes = draw_codes(shared_model, processor, generator, order, Guidance(5.0, 1.0))
        # The mean log-likelihood of samples is minus the entropy.
        logs = seen[0].log_softmax(-1)
        found = logs.gather(1, codes[:, :1]).mean()
        entropy = -(logs[0].exp() * logs[0]).sum()
        spread = ((logs[0].exp() * (logs[0] + entropy) ** 2).sum() / few).sqrt()
        assert abs(found + entropy) < 4 * spread


def test_batches_are_cut_by_images():
    def seeds(size):
        batches = cut_batches(2, 3, size)
        made = [orders_of(b, 3, "ab".__getitem__, lambda p, i: (p, i)) for b in batches]
        return [[(prompt, [i for _, i in of]) for prompt, of in orders] for orders in made]

    assert seeds(4) == [[("a", [0, 1, 2]), ("b", [0])], [("b", [1, 2])]]
    assert seeds(8) == [[("a", [0, 1, 2]), ("b", [0, 1, 2])]]


class TestMistakes:
    @pytest.mark.parametrize(
        "case", [row for row in ONE_EACH if row.family != "janus"], indirect=True, ids=str
    )
    def test_other_families(self, case, processor):
        with pytest.raises(ConfigError, match=r"does not draw images\n hint: use Janus-1\.3B"):
            vlft.draw(None, processor, "red")

    @ONE
    def test_prompts(self, processor):
        with pytest.raises(DataError, match=r"0 images listed, 1 <image>"):
            vlft.draw(None, processor, "<image>red")
        with pytest.raises(DataError, match=r"a prompt of \d+ tokens, at most 16368"):
            vlft.draw(None, processor, "red " * 20000)

    @ONE
    def test_settings(self, processor):
        with pytest.raises(UsageError, match="--num-images: found 0, at least 1 is allowed"):
            vlft.draw(None, processor, "red", num_images=0)
        with pytest.raises(UsageError, match="--temperature: found -1, at least 0"):
            vlft.draw(None, processor, "red", temperature=-1.0)

    @ONE
    def test_scores_that_are_no_numbers(self, processor, model):
        model.model.generation_head.vision_head.bias.data[3] = torch.nan
        with pytest.raises(vlft.VlftError, match="its scores are no numbers"):
            vlft.draw(model, processor, "red")
