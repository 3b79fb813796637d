"""``vlft draw``: files that are whole or absent, resumed, and what is said of mistakes."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SIGLIP, write_jsonl
from PIL import Image

import vlft
from vlft.cli.commands import COMMANDS
from vlft.cli.options import read_settings
from vlft.errors import UsageError, VlftError
from vlft.inference import draw_run, image_files
from vlft.inference.image_files import ImageFiles, read_facts
from vlft.inference.reconstruct import psnr, reconstruct, ssim

# Its images have a tenth of the codes of the golden checkpoints'.
TINY = Path(__file__).parent.parent / "sample_data" / "draw" / "tiny-janus"
MODEL = ["--model", str(TINY)]
PROMPTS = ["--prompt", "a red square", "a blue circle", "--num-images", "3", "--batch-size", "4"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words: str):
    command = COMMANDS["draw"]
    config, _ = read_settings(command.config, "draw", [*MODEL, *words])
    return draw_run.run_draw(config)


def files(folder: str = "images") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.png"))}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def message(*words: str) -> str:
    with pytest.raises(UsageError) as error:
        run(*words)
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "name", "said"),
    [
        (["--prompt", "a"], "draw_batch", "while images are drawn\n hint: lower --batch-size"),
        (
            ["--reconstruct", str(GOLDEN / "images" / "chart.png")],
            "report",
            "while images are encoded and decoded\n hint: use --dtype bfloat16",
        ),
    ],
)
def test_out_of_memory_is_told(monkeypatch, words, name, said):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(draw_run, name, full)
    with pytest.raises(VlftError) as error:
        run(*words)
    assert f"out of memory {said}" in str(error.value)


class TestFiles:
    def test_are_those_of_python(self):
        result = run(*PROMPTS)
        assert [path.name for path in result.images] == [
            "00001-01.png", "00001-02.png", "00001-03.png",
            "00002-01.png", "00002-02.png", "00002-03.png",
        ]  # fmt: skip
        model, processor = vlft.load(TINY)
        drawn = vlft.draw(
            model, processor, ["a red square", "a blue circle"], num_images=3, batch_size=4
        )
        for path, drawing in zip(result.images, drawn, strict=True):
            assert np.array_equal(pixels(path), np.asarray(drawing.image))

    def test_say_what_they_were_drawn_from(self):
        run("--prompt", "a red square", "--cfg-weight", "3", "--seed", "7")
        facts = read_facts(Path("images/00001-01.png"))
        assert facts["prompt"] == ["a red square"]
        assert (facts["cfg_weight"], facts["temperature"], facts["seed"]) == (3.0, 1.0, 7)
        assert facts["image"] == 0
        assert facts["vlft"] == vlft.__version__

    def test_prompts_have_no_file_and_need_no_image(self, capfd):
        run("--prompt", "a red square")
        said = capfd.readouterr().err
        assert ".jsonl" not in said
        assert "no image" not in said
        assert "1 image drawn" in said

    def test_the_sheet_shows_all(self, monkeypatch):
        monkeypatch.setattr(image_files, "PER_SHEET", 4)
        result = run(*PROMPTS)
        assert [path.name for path in result.sheets] == ["sheet-01.png", "sheet-02.png"]
        with Image.open(result.sheets[0]) as sheet:
            assert sheet.size == (3 * image_files.SIDE, 2 * (image_files.SIDE + 14))
            tile = sheet.crop((2, 2, image_files.SIDE - 2, image_files.SIDE - 2))
        with Image.open(result.images[0]) as image:
            small = image.resize(tile.size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(tile), np.asarray(small))


class TestList:
    """drawings.jsonl"""

    def test_vlft_eval_scores_drawings(self):
        """By a metric of one's own, which gets the file of the drawing and its prompt."""
        Path("bright.py").write_text(
            "from PIL import Image\n"
            "def score(reply, reference):\n"
            "    assert reference.startswith('a ')\n"
            "    with Image.open(reply) as image:\n"
            "        return image.convert('L').getpixel((0, 0)) / 255\n"
        )
        result = run(*PROMPTS)
        rows = [json.loads(line) for line in Path("images/drawings.jsonl").read_text().splitlines()]
        assert [row["response"] for row in rows] == [str(p.absolute()) for p in result.images]
        assert [row["query"] for row in rows] == ["a red square"] * 3 + ["a blue circle"] * 3
        scored = vlft.evaluate(
            vlft.EvalConfig(
                results=(Path("images/drawings.jsonl"),), metric=("bright.py",), references="query"
            )
        )
        images = [Image.fromarray(pixels(path)) for path in result.images]
        corner = [image.convert("L").getpixel((0, 0)) / 255 for image in images]
        (mean,) = scored.summary["metrics"]["bright"]["scores"]
        assert mean["mean"] == pytest.approx(sum(corner) / 6)

    def test_a_file_of_others_is_refused(self):
        Path("images").mkdir()
        Path("images/drawings.jsonl").write_text('{"query": "mine"}\n')
        assert "drawings.jsonl: is there, and vlft has not drawn it" in message("--prompt", "red")


class TestReconstruction:
    def test_figures_of_each_image_and_their_mean(self, capfd):
        names = [str(GOLDEN / "images" / name) for name in ("photo_a.jpg", "chart.png")]
        run("--reconstruct", *names)
        found = re.findall(r"PSNR +([\d.]+) dB +SSIM ([\d.-]+)", capfd.readouterr().out)
        figures = np.array(found, float)
        assert figures[:2].mean(0) == pytest.approx(figures[2], abs=0.006)
        model, processor = vlft.load(TINY)
        one = reconstruct(model, processor, names[0])
        assert figures[0] == pytest.approx(one, abs=0.006)
        assert not Path("images").exists()

    def test_equal_images(self):
        image = torch.rand(1, 3, 20, 20) * 255
        assert psnr(image, image) == np.inf
        assert ssim(image, image) == pytest.approx(1)

    def test_the_definitions(self):
        """The figures equal a plain computation in numpy that goes from window to window."""
        rng = np.random.default_rng(0)
        x, y = rng.uniform(0, 255, (2, 3, 13, 12))
        line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
        window = np.outer(line, line) / line.sum() ** 2
        values = []
        for channel, top, left in itertools.product(range(3), range(3), range(2)):
            a, b = (side[channel, top : top + 11, left : left + 11] for side in (x, y))
            (mean_a, mean_b) = ((window * part).sum() for part in (a, b))
            var_a, var_b = ((window * (p - m) ** 2).sum() for p, m in ((a, mean_a), (b, mean_b)))
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 2.55**2) / (mean_a**2 + mean_b**2 + 2.55**2)
            values.append(luminance * (2 * both + 7.65**2) / (var_a + var_b + 7.65**2))
        one, other = (torch.from_numpy(side)[None] for side in (x, y))
        assert ssim(one, other) == pytest.approx(np.mean(values), rel=1e-9)
        error = ((x - y) ** 2).mean()
        assert psnr(one, other) == pytest.approx(20 * np.log10(255) - 10 * np.log10(error))

    def test_a_missing_image(self):
        assert "nowhere.png" in message("--reconstruct", "nowhere.png")


class TestResume:
    def test_after_a_stop_the_files_are_the_same(self, monkeypatch):
        """A batch that the stop cut is drawn whole again: other sizes round otherwise."""
        run(*PROMPTS, "--output-dir", "whole")
        save, saved = ImageFiles.save, []

        def stopping(self, number, image):
            if len(saved) == 2:
                raise KeyboardInterrupt
            saved.append(number)
            save(self, number, image)

        with monkeypatch.context() as patch:
            patch.setattr(ImageFiles, "save", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(*PROMPTS)
        assert set(files()) == {"00001-01.png", "00001-02.png"}
        before = {path: path.stat().st_mtime_ns for path in Path("images").glob("0*.png")}
        run(*PROMPTS)
        assert files() == files("whole")
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    def test_nothing_is_loaded_if_all_are_there(self, monkeypatch, capfd):
        run(*PROMPTS)
        monkeypatch.setattr(draw_run, "load_for_inference", None)
        run(*PROMPTS)
        assert "images holds 6 of 6 images already" in capfd.readouterr().err

    def test_more_images_keep_the_first(self):
        run("--prompt", "a red square")
        first = files()
        run("--prompt", "a red square", "a cat", "--num-images", "2")
        assert files()["00001-01.png"] == first["00001-01.png"]

    @pytest.mark.parametrize(
        ("changed", "found"),
        [
            (["--cfg-weight", "2"], "another cfg_weight, 5.0"),
            (["--seed", "1"], "another seed, 42"),
            (["--dtype", "bfloat16"], "another dtype, float32"),
        ],
    )
    def test_other_settings_are_refused(self, changed, found):
        run("--prompt", "a red square")
        before = files()
        text = message("--prompt", "a red square", *changed)
        assert f"images/00001-01.png: was drawn with {found}" in text
        assert "name another --output-dir, or add --overwrite" in text
        assert files() == before
        run("--prompt", "a red square", *changed, "--overwrite")
        assert files()["00001-01.png"] != before["00001-01.png"]

    def test_other_prompts_are_refused(self):
        run("--prompt", "a red square")
        assert "another prompt, ['a red square']" in message("--prompt", "a cat")

    @pytest.mark.parametrize("name", ["00001-01.png", "sheet-01.png"])
    def test_files_of_others_are_refused(self, name):
        Path("images").mkdir()
        Image.new("RGB", (4, 4)).save(Path("images", name))
        assert f"images/{name}: is there, and vlft has not drawn it" in message("--prompt", "red")

    def test_a_damaged_file_is_refused_and_replaced(self):
        run("--prompt", "a red square")
        path = Path("images/00001-01.png")
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert "vlft has not drawn it" in message("--prompt", "a red square")
        run("--prompt", "a red square", "--overwrite")
        assert path.read_bytes() == whole


class TestData:
    def test_records_may_show_images(self):
        rows = [
            {"query": "<image>Make it blue.", "images": ["photo_a.jpg"]},
            {"query": "a red square", "response": "is not read"},
        ]
        write_jsonl(Path("prompts.jsonl"), rows)
        given = ["--dataset", "prompts.jsonl", "--image-root", str(GOLDEN / "images")]
        result = run(*given, "--temperature", "0")
        assert read_facts(result.images[0])["prompt"] == ["<image>Make it blue."]
        assert len(read_facts(result.images[0])["images"]) == 1
        run("--prompt", "a red square", "--temperature", "0", "--output-dir", "one")
        assert np.array_equal(pixels(result.images[1]), pixels("one/00001-01.png"))

    def test_a_system_prompt_is_used(self):
        rows = [{"query": "red", "system": text} for text in ("", "Draw in oil.")]
        write_jsonl(Path("prompts.jsonl"), [*rows, {"query": "red"}])
        result = run("--dataset", "prompts.jsonl", "--temperature", "0")
        empty, oil, none = map(pixels, result.images)
        assert np.array_equal(empty, none)
        assert not np.array_equal(empty, oil)


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], "vlft draw: nothing to draw\n hint: add e.g. --prompt 'a red square'"),
            (["--prompt", "a", "--dataset", "b"], "--prompt: found together with --dataset"),
            (["--prompt", "a", "--image-root", "b"], "--image-root: only for --dataset"),
            (["--load-dataset-config"], "--load-dataset-config: needs the run whose validation"),
            (["--load-dataset-config", "--prompt", "a"], "found together with --prompt or --dat"),
            (["--load-dataset-config", "--on-bad-sample", "skip"], "which reads the data as the"),
            (["--reconstruct", "a.png", "--prompt", "a"], "--prompt: found --reconstruct, which"),
            (["--reconstruct", "a.png", "--seed", "1"], "--seed: found --reconstruct, which"),
            (["--prompt", " "], "--prompt: found ' '\n hint: write what to draw"),
            (["--prompt", "<image>a"], "1 <image>"),
            (["--prompt", "a", "--merge-lora"], "--merge-lora: needs an adapter"),
            (["--prompt", "a", "--num-images", "0"], "--num-images: found 0, at least 1"),
            (["--prompt", "a", "--cfg-weight", "-1"], "--cfg-weight: found -1, at least 0"),
            (["--prompt", "a " * 20000], "tokens"),
        ],
    )
    def test_of_settings(self, words, expected):
        assert expected in message(*words)
        assert not Path("images").exists()

    def test_a_family_that_does_not_draw(self):
        text = message("--prompt", "a", "--model", str(SIGLIP.folder))
        assert "DeepSeek-VL (SigLIP tower) does not draw images" in text

    def test_a_file_for_a_folder(self):
        Path("images").write_text("x")
        assert "images: not a folder\n hint: name another --output-dir" in message("--prompt", "a")

    def test_bad_records(self):
        write_jsonl(Path("prompts.jsonl"), [{"query": "red"}, {"images": []}])
        assert "prompts.jsonl:2" in message("--dataset", "prompts.jsonl")
        result = run("--dataset", "prompts.jsonl", "--on-bad-sample", "skip")
        assert len(result.images) == 1


def test_through_the_command_line(monkeypatch, capfd):
    COMMANDS["draw"].run(
        *read_settings(COMMANDS["draw"].config, "draw", [*MODEL, "--prompt", "red"])
    )
    err = capfd.readouterr().err
    assert "1 image in images, shown on sheet-01.png" in err
    assert read_facts(Path("images/00001-01.png"))["prompt"] == ["red"]
