"""Data sets of a hub: named, downloaded by a stand-in of ``datasets``, kept, read as folders."""

from __future__ import annotations

import json
import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest
from conftest import GOLDEN

from vlft.data import hub_sets
from vlft.data.hub_sets import hub_folder, is_hub_set
from vlft.data.options import DataOptions
from vlft.data.specs import expand, open_file
from vlft.data.split import Draws
from vlft.errors import DataError

pyarrow = pytest.importorskip("pyarrow")
SHA = "0123456789abcdef" * 2 + "01234567"
SPLITS = {"default": ["train", "test"], "small": ["train"]}


class Hub(ModuleType):
    """What is asked of ``datasets``; ``fault`` is raised by all of it."""

    def __init__(self):
        super().__init__("datasets")
        self.exceptions = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
        self.asked: list[tuple] = []
        self.fault: Exception | None = None
        self.subsets = ["default"]

    def _note(self, *call):
        if self.fault is not None:
            raise self.fault
        self.asked.append(call)

    def get_dataset_config_names(self, source, revision):
        self._note("subsets", source, revision)
        return self.subsets

    def get_dataset_split_names(self, source, subset, revision):
        self._note("splits", source, subset, revision)
        return SPLITS[subset]

    def load_dataset(self, source, subset, *, split, revision):
        self._note("load", source, subset, split, revision)
        image = {"bytes": (GOLDEN / "images" / "photo_a.jpg").read_bytes(), "path": None}
        count = {"train": 5, "test": 2}[split]
        columns = {"image": [image] * count, "question": [f"{n}?" for n in range(count)]}
        table = pyarrow.table({**columns, "answer": ["yes"] * count})
        return SimpleNamespace(data=SimpleNamespace(table=table))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub

    made = Hub()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", made)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", made.exceptions)
    info = lambda _, name, revision: made._note("info", name, revision) or SimpleNamespace(sha=SHA)  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    hub_folder.cache_clear()
    yield made
    hub_folder.cache_clear()


def read(spec: str):
    return open_file(*expand([spec]), Draws(0), DataOptions(), {})


def message(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        hub_folder(spec)
    return str(caught.value)


def test_a_split_is_kept_under_its_commit_and_read(hub):
    file = read("hf:owner/name:test")
    assert [item.reply for _, item in file.items] == ["yes", "yes"]
    assert len(file.items.columns.images) == 2
    assert hub.asked[-1] == ("load", "owner/name", "default", "test", SHA)
    assert file.path.name == f"hf-owner--name--default@{SHA}--test"
    assert sorted(path.name for path in file.path.iterdir()) == ["data.arrow", "state.json"]
    assert not list(file.path.parent.glob(".*"))


def test_a_part_of_it_is_drawn(hub):
    assert len(read("hf:owner/name:train#3").indices) == 3
    assert len(read("hf:owner/name:train#40%").indices) == 2


def test_a_kept_commit_needs_no_network(hub):
    first = hub_folder(f"hf:owner/name@{SHA}:train")
    assert hub.asked[0][0] == "subsets"  # The commit is known.
    hub_folder.cache_clear()
    hub.fault = ConnectionError("no network")
    assert hub_folder(f"hf:owner/name@{SHA}:train") == first
    assert hub_folder(f"hf:owner/name@{SHA}:train#2") == f"{first}#2"


def test_a_branch_means_its_commit_of_today(hub):
    hub_folder("hf:owner/name@main:train")
    assert hub.asked[0] == ("info", "owner/name", "main")
    # In one process it is asked for once.
    count = len(hub.asked)
    hub_folder("hf:owner/name@main:train")
    assert len(hub.asked) == count


def test_what_is_left_open_is_asked(hub):
    found = message("hf:owner/name")
    assert "hf:owner/name: has 2 splits; which is not said" in found
    assert "with one of train, test" in found
    assert "has no split val" in message("hf:owner/name:val")
    hub.subsets = ["default", "small"]
    assert "has 2 subsets; which is not said" in message("hf:owner/name:train")
    assert hub_folder("hf:owner/name/small").endswith(f"small@{SHA}--train")


@pytest.mark.parametrize("spec", ["hf:name", "hf:a/b:c:d", "hf:a/b/c/d", "hf:", "ms:a/b c"])
def test_other_forms_are_refused(hub, spec):
    assert "is no data set of a hub" in message(spec)


def test_a_file_of_such_a_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_set("hf:a.jsonl")
    (tmp_path / "hf:a.jsonl").write_text(json.dumps({"query": "q", "response": "r"}))
    assert not is_hub_set("hf:a.jsonl")


def test_a_hub_that_cannot_be_reached_is_one_message(hub, monkeypatch):
    hub_folder("hf:owner/name:train")
    hub_folder.cache_clear()
    hub.fault = ConnectionError("no route to host\nand more")
    found = message("hf:owner/name:train")
    assert "hf:owner/name:train: Hugging Face did not give it: no route to host" in found
    assert "check the name, the revision and the network" in found
    assert f"in the cache: {hub_sets.cache_folder('hub_sets')}" in found
    for fault in (ValueError("bad"), hub.exceptions.DatasetsError("gone"), KeyError("x")):
        hub.fault = fault
        assert "Hugging Face did not give it" in message("hf:owner/name:train")


def test_the_errors_of_the_http_library_are_known(monkeypatch):
    """Nothing listens there; the library's own error, whichever it uses."""
    import huggingface_hub

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    library = SimpleNamespace(exceptions=SimpleNamespace(DatasetsError=KeyError))
    with pytest.raises(hub_sets._faults(library)):
        huggingface_hub.HfApi(endpoint=address).dataset_info("owner/name")


def test_libraries_that_are_not_installed_are_named(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "pip install 'vlft[modelscope]'" in message("ms:owner/name:train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'vlft[datasets]'" in message("hf:owner/name:train")


def test_files_of_modelscope_come_without_scripts(hub, monkeypatch, tmp_path):
    asked = []

    def dataset_snapshot_download(name, **given):
        asked.append((name, given))
        return str(tmp_path)

    modelscope = SimpleNamespace(dataset_snapshot_download=dataset_snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", modelscope)
    assert hub_folder("ms:owner/name@v1:train").endswith("ms-owner--name--default@v1--train")
    assert asked == [("owner/name", {"ignore_file_pattern": ["*.py"], "revision": "v1"})]
    assert hub.asked[-1] == ("load", str(tmp_path), "default", "train", None)
