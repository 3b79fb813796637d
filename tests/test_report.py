"""Reports: nothing of the data becomes HTML, and they show what the run and its files hold."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
from conftest import GOLDEN, write_jsonl
from PIL import Image

import vlft
from vlft.config import ReportConfig
from vlft.errors import CheckpointError, UsageError
from vlft.report.charts import Curve, chart
from vlft.report.gallery import Card, gallery
from vlft.report.page import NAME, POLICY
from vlft.report.runs import run_report, write_run_report

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "<script>document.title = 'evil'</script>\"'><img src=x onerror=alert(1)>"
PHOTO = GOLDEN / "images" / "photo_a.jpg"


class Tags(HTMLParser):
    """Parses a page: its tags with their attributes in ``found``, and all its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def read(path: Path) -> Tags:
    """A report; it can run nothing and loads nothing."""
    page = path.read_text("utf-8")
    tags = Tags(page)
    assert not tags.of("script")
    assert not tags.of("link")
    for _, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg")
        assert "href" not in attributes
    assert POLICY in [meta.get("content") for meta in tags.of("meta")]
    return tags


@pytest.fixture
def make_run(tmp_path):
    """A function that makes the folder of a run."""

    def make(name="v0", rows=None, **settings):
        run = tmp_path / name
        (run / "infer").mkdir(parents=True)
        (run / "run_config.json").write_text(json.dumps({"model": None, **settings}))
        (run / "provenance.json").write_text(
            json.dumps({"started": "2026-01-01", "data": {f"{EVIL}.jsonl": "ab" * 32}})
        )
        lines = [
            {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "packed_tokens_per_second": 10.0},
            {"step": 2, "loss": float("nan"), "learning_rate": 5e-4},
            {"step": 2, "val_loss": 1.25},
            {"step": 3, "loss": 1.0, "learning_rate": 1e-4},
            {"step": 3, "val_loss": 1.5},
        ]
        write_jsonl(run / "metrics.jsonl", lines)
        if rows is not None:
            write_jsonl(run / "infer" / "checkpoint-3-val.jsonl", rows)
        return run

    return make


def line(reply, label="A cat.", **fields):
    row = {"query": "<image>What is it?", "response": reply, "finish": "stop", "label": label}
    return {**row, "images": [str(PHOTO)], **fields}


def test_a_run(make_run):
    run = make_run(rows=[line(EVIL), line("A dog.")], lora_rank=4, output_dir=EVIL)
    (run / "infer" / "checkpoint-3-val.scores.jsonl").write_text('{"result_line": 1}\n')
    write_run_report(run)
    tags = read(run / NAME)
    assert "1.2500 at step 2" in tags.text
    assert re.search(r"lora-rank\s*4", tags.text)
    assert tags.text.count(EVIL) == 4
    # Loss (training, smoothed, validation), learning rate, speed.
    assert len(tags.of("polyline")) == 5
    assert len(tags.of("circle")) == 1
    (first, second) = tags.of("img")
    data = base64.b64decode(first["src"].split(",")[1])
    with Image.open(io.BytesIO(data)) as image:
        assert max(image.size) <= 320
    assert first == second


def test_lines_and_images_that_cannot_be_read(make_run):
    run = make_run(rows=[line("1", images=["/nowhere/cat.png"]), [1], {"response": 2}])
    with (run / "infer" / "checkpoint-3-val.jsonl").open("a") as file:
        file.write('{"query": "cut o')
    write_run_report(run)
    tags = read(run / NAME)
    assert "cat.png cannot be read" in tags.text
    assert not tags.of("img")


def test_boxes_are_drawn_on_the_image():
    reply = (
        "<|ref|>a <b>cat</b><|/ref|><|det|>[[10, 20, 110, 220], [0, 0, 999, 999]]<|/det|>"
        "<|det|>title [5, 5, 6, 6]<|/det|><|det|>[[1, 2]]<|/det|>"
    )
    tags = Tags(gallery([Card([PHOTO], [("reply", reply)], "", reply)]))
    found = [[box[name] for name in ("x", "y", "width", "height")] for box in tags.of("rect")]
    assert found == [
        ["10.0", "20.0", "100.0", "200.0"], ["0.0", "0.0", "999.0", "999.0"],
        ["5.0", "5.0", "1.0", "1.0"],
    ]  # fmt: skip
    assert "a <b>cat</b>" in tags.text
    assert "title" in tags.text
    assert not tags.of("b")
    # Of two images nothing says which is meant.
    assert not Tags(gallery([Card([PHOTO] * 2, [], "", reply)])).of("rect")


def test_curves():
    assert chart("loss", [Curve("a", [(1, float("nan"))]), Curve("b", [])]) == ""
    tags = Tags(chart("loss", [Curve("a", [(0, 1.0), (10, 3.0)]), Curve("b", [(5, 2.0)])]))
    rising, dot = (one["points"].split() for one in tags.of("polyline"))
    places = [tuple(map(float, place.split(","))) for place in (*rising, *dot)]
    assert places[0][0] < places[2][0] < places[1][0]
    assert places[0][1] > places[2][1] > places[1][1]
    assert places[2] == places[3]


def test_an_evaluation(tmp_path):
    """The records that tuning changed come first, with both replies."""
    base = [line("A cat.", id=1), line("A dog.", id=2), line(EVIL, id=3)]
    tuned = [line("A cat.", id=1), line("A cat.", id=2), line("A bird.", id=3)]
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("base", base), ("tuned", tuned))
    ]
    (tmp_path / "tuned.settings.json").write_text(json.dumps({"settings": {"seed": 7}}))
    vlft.evaluate(vlft.EvalConfig(results=tuple(files)))
    tags = read(tmp_path / "tuned.report.html")
    assert re.search(r"exact-match\s+33.3\s+66.7", tags.text)
    scores = re.findall(r"exact-match ([\d.]+ -> [\d.]+)", tags.text)
    assert scores == ["0.00 -> 1.00", "1.00 -> 1.00", "0.00 -> 0.00"]
    assert EVIL in tags.text
    assert re.search(r"seed\s*7", tags.text)
    assert not (tmp_path / "base.report.html").exists()


def test_drawings_are_shown(tmp_path):
    """Target, base and tuned beside each other; a name that is no drawing's stays text."""
    target, files = tmp_path / "target.png", []
    Image.new("RGB", (32, 32), "lime").save(target)
    for name, colour in (("base", "red"), ("tuned", "blue")):
        image = tmp_path / name / "00001-01.png"
        image.parent.mkdir()
        Image.new("RGB", (32, 32), colour).save(image)
        row = {"query": "a blue square", "label": str(target), "response": str(image)}
        rows = [{**row, "id": 1, "drawing": image.name}, {**row, "id": 2, "drawing": "other.png"}]
        files.append(write_jsonl(image.parent / "drawings.jsonl", rows))
    vlft.evaluate(vlft.EvalConfig(results=tuple(files)))
    tags = read(tmp_path / "tuned" / "drawings.report.html")
    shown = [image["src"].partition(",")[2] for image in tags.of("img")]
    colours = [Image.open(io.BytesIO(base64.b64decode(data))).getpixel((9, 9)) for data in shown]
    assert [max(range(3), key=colour.__getitem__) for colour in colours] == [1, 0, 2]
    assert tags.text.count("00001-01.png") == 2


def test_a_file_of_others_is_kept(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [line("A cat.")])
    other = tmp_path / "a.report.html"
    other.write_text("mine")
    with pytest.raises(CheckpointError, match=r"a\.report\.html: vlft has not written this"):
        vlft.evaluate(vlft.EvalConfig(results=(file,)))
    assert other.read_text() == "mine"
    assert not (tmp_path / "a.scores.jsonl").exists()


def test_runs_beside_each_other(make_run, tmp_path):
    runs = (make_run("v0", lora_rank=4), make_run("v1", lora_rank=16))
    target = tmp_path / "two.html"
    run_report(ReportConfig(runs=runs, output=target))
    tags = read(target)
    assert re.search(r"--lora-rank\s*4\s*16", tags.text)
    assert "--seed" not in tags.text
    # Validation loss, smoothed training loss, learning rate, speed of each.
    assert len(tags.of("polyline")) == 8
    # In its own place a report is written anew.
    run_report(ReportConfig(runs=runs, output=target))


def test_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"no run_config.json there\n hint: name run folders"):
        run_report(ReportConfig(runs=(tmp_path,)))
    with pytest.raises(UsageError, match="vlft report: found no run folder"):
        run_report(ReportConfig())


def test_in_a_browser(make_run):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no chromium; Debian's package has it")
    run = make_run(rows=[line(EVIL)])
    write_run_report(run)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    shown = subprocess.run(
        [*command, (run / NAME).as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert title is not None
    assert title[1].startswith("Run ")
    assert "Refused to" not in shown.stderr
