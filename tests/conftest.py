"""Shared fixtures: the family matrix, its golden checkpoints, and small data sets on them."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import ModelFolder, describe
from vlft.checkpoints.placement import Placement
from vlft.families.image_settings import ImageSettings
from vlft.training import plots

if TYPE_CHECKING:
    from collections.abc import Iterator

GOLDEN = Path(__file__).parent / "golden"

# By default glibc returns large blocks to the kernel at once, which clears them at the next use: a
# third of the time of the tests with the SAM tower. -3 and -1 are M_MMAP_THRESHOLD and
# M_TRIM_THRESHOLD of mallopt(3).
if sys.platform == "linux":
    _libc = ctypes.CDLL("libc.so.6")
    _libc.mallopt(-3, 1 << 30)
    _libc.mallopt(-1, (1 << 31) - 1)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage need not walk through it each time."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class FamilyCase:
    """A row of the family matrix.

    Attributes:
        family: name in the registry.
        checkpoint: golden checkpoint of the family.
        roles: user and assistant, as the golden conversations write them.
        rows: samples that are compared one by one; fewer where images are slow to encode.
        image_mode: a small one, of the families that have modes. They take single pages.
    """

    family: str
    checkpoint: str
    roles: tuple[str, str]
    rows: int = 20
    image_mode: str | None = None

    def __str__(self) -> str:
        return self.checkpoint

    @property
    def folder(self) -> Path:
        return GOLDEN / "checkpoints" / self.checkpoint

    @property
    def settings(self) -> dict[str, str]:
        """Of a run."""
        return {"image_mode": self.image_mode} if self.image_mode else {}

    @property
    def cases(self) -> Path:
        return GOLDEN / "cases" / self.checkpoint


WORDS = ("User", "Assistant")
TOKENS = ("<|User|>", "<|Assistant|>")
SIGLIP = FamilyCase("deepseek_vl", "deepseek-vl-siglip", WORDS)
HYBRID = FamilyCase("deepseek_vl_hybrid", "deepseek-vl-hybrid", WORDS, rows=5)
FULLRES = FamilyCase("deepseek_vl_hybrid", "deepseek-vl-hybrid-fullres", WORDS)
VL2_MHA = FamilyCase("deepseek_vl2", "deepseek-vl2-mha", TOKENS, rows=10)
VL2_MLA = FamilyCase("deepseek_vl2", "deepseek-vl2-mla", TOKENS, rows=10)
VL2_NOAUX = FamilyCase("deepseek_vl2", "deepseek-vl2-noaux", TOKENS, rows=10)
JANUS = FamilyCase("janus", "janus", WORDS)
JANUS_PRO = FamilyCase("janus", "janus-pro", TOKENS)

OCR = FamilyCase("deepseek_ocr", "deepseek-ocr", TOKENS, rows=5, image_mode="tiny")
OCR2 = FamilyCase("deepseek_ocr2", "deepseek-ocr2", TOKENS, rows=5, image_mode="small")

# Golden numbers are compared on every checkpoint, properties of any model on one of each family.
MATRIX = [SIGLIP, HYBRID, FULLRES, VL2_MHA, VL2_MLA, VL2_NOAUX, JANUS, JANUS_PRO, OCR, OCR2]
ONE_EACH = [SIGLIP, HYBRID, VL2_NOAUX, JANUS, OCR, OCR2]
# Those that take several questions and images; DeepSeek-OCR was trained on single pages.
DIALOGUES = [case for case in ONE_EACH if not case.image_mode]
in_dialogues = pytest.mark.parametrize("case", DIALOGUES, indirect=True, ids=str)
only_siglip = pytest.mark.only_siglip
without_ocr2 = pytest.mark.without_ocr2


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="of runs; two thirds of other commands")
    parser.addoption("--mutations", type=int, default=24, help="trials of test_hostile.py")
    parser.addoption("--records", type=int, default=200, help="records of test_data_fuzz.py")
    parser.addoption("--device", default="cuda", help="of test_cuda.py: cuda, or cpu to try it")
    parser.addoption("--requests", type=int, default=20, help="of test_serve.py, for its memory")
    parser.addoption("--notebooks", action="store_true", help="run those of examples/")
    parser.addoption("--hostile-seed", type=int, default=0, help="of test_hostile.py")


@pytest.fixture(scope="session")
def kills(request) -> int:
    return request.config.getoption("--kills")


@pytest.fixture(scope="session")
def mutations(request) -> int:
    return request.config.getoption("--mutations")


# The slowest files start first, so that at the end no worker runs one while the others are idle.
LONG_FILES = ("test_readme.py", "test_torture.py", "test_processes.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@contextmanager
def without_gpu() -> Iterator[None]:
    """Hides every GPU from this process and from those it starts.

    Otherwise ``--device auto`` would choose the GPU, and with it bfloat16 in place of float32.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@contextmanager
def without_curves() -> Iterator[None]:
    """Keeps runs from drawing PNG files, because that takes half of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "FIGURES", {})
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Seeds torch, and hides GPUs and keeps curves from being drawn unless a mark asks for them.

    Without a seed, random weights now and then give two tokens nearly the same score, and then the
    reply depends on how the processor rounds.
    """
    torch.manual_seed(0)
    with (
        nullcontext() if item.get_closest_marker("cuda") else without_gpu(),
        nullcontext() if item.get_closest_marker("draws_curves") else without_curves(),
    ):
        return (yield)


def pytest_runtest_setup(item):
    device = item.config.getoption("--device")
    if item.get_closest_marker("cuda") and device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU; --device cpu runs tests/test_cuda.py on the CPU")


def pytest_generate_tests(metafunc):
    """Runs a test that takes ``case`` on one checkpoint of each family, unless it names others."""
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "case" in metafunc.fixturenames and not any("case" in names for names in given):
        one = metafunc.definition.get_closest_marker("only_siglip")
        dear = metafunc.definition.get_closest_marker("without_ocr2")
        rows = [SIGLIP] if one else [case for case in ONE_EACH if not (dear and case is OCR2)]
        metafunc.parametrize("case", rows, indirect=True, ids=str, scope="session")


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Keeps the vision cache of the tests out of the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def case(request) -> FamilyCase:
    return request.param


@pytest.fixture(scope="session")
def folder(case) -> ModelFolder:
    return describe(case.folder)


@pytest.fixture(scope="session")
def processor(case, folder):
    return ImageSettings(image_mode=case.image_mode).apply(folder.processor())


@pytest.fixture
def make_model(folder):
    """A function that loads a fresh model; float32 on the CPU unless told otherwise."""

    def make(quantize: str = "none", dtype: torch.dtype = torch.float32) -> Any:
        placement = Placement(torch.device("cpu"), dtype, quantize)
        return load_model(folder, placement)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def shared_model(folder):
    """One model for all tests that only run it."""
    placement = Placement(torch.device("cpu"), torch.float32)
    return load_model(folder, placement)


PHOTOS = ("photo_a.jpg", "photo_b.jpg", "chart.png")


@pytest.fixture
def large_epsilon(monkeypatch):
    """Runs in this process step as those of ``launched.rehearse_on_the_cpu``."""
    from launched import with_large_epsilon

    from vlft.training import run

    monkeypatch.setattr(run, "make_optimizer", with_large_epsilon(run.make_optimizer))


def make_rows(count: int = 24, case: FamilyCase = SIGLIP) -> list[dict[str, Any]]:
    """Rows with shared images and prompts, repeats, text alone, history, several images.

    Of the last two kinds only what the family takes.
    """
    rows: list[dict[str, Any]] = []
    for index in range(count - 4):
        rows.append(
            {
                "query": f"<image>What is number {index % 4}?",
                "response": f"It is {index % 5}.",
                "images": [PHOTOS[index % 3]],
            }
        )
    rows.append(dict(rows[0]))
    rows.append({"query": "Hello.", "response": "Good day to you.", "system": ""})
    rows.append(
        {
            "query": "And now <image>?",
            "response": "A chart.",
            "history": [["<image>What is number 1?", "It is 1."]],
            "images": ["photo_a.jpg", "chart.png"],
        }
    )
    rows.append({"query": "Hello.", "response": "Bye.", "system": "Be brief."})
    if case.image_mode:
        (asked, _), images = rows[-2]["history"][0], ["photo_a.jpg"]
        rows[-2] = {"query": asked, "response": "A chart.", "images": images}
        rows = [{key: row[key] for key in row if key != "system"} for row in rows]
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def train_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "train.jsonl", make_rows())


@pytest.fixture
def inputs(processor):
    """A batch of a question about an image, as the model takes it."""
    row = {"query": "<image>What is it?", "images": ["images/photo_a.jpg"]}
    batch = processor.collate([processor.encode(row, GOLDEN)])
    del batch["labels"]
    return batch


def logits(model, inputs):
    """(1, T, V) of a model in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**inputs).logits
