"""Outputs replace what vlft has made and nothing else, and one process at a time writes them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import tempfile
import threading
import time

import pytest
from conftest import SIGLIP

import vlft
from vlft import locks
from vlft.checkpoints.outputs import MARK, output_folder
from vlft.checkpoints.small_files import _copy
from vlft.data.check import write_messages
from vlft.errors import CheckpointError, ConfigError
from vlft.files import open_tensors
from vlft.inference.results import ResultFile
from vlft.locks import locked


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(target, text, *, overwrite=True, needed=(), work=lambda: None):
    with output_folder(target, needed, overwrite=overwrite) as part:
        (part / "model").write_text(text)
        work()


def test_an_output_is_whole_or_absent_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "a[b]" / "m"
    write(target, "first")
    assert (target / "model").read_text() == "first"
    with pytest.raises(KeyboardInterrupt):
        write(target, "second", work=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (target / "model").read_text() == "first"
    write(target, "third")
    assert (target / "model").read_text() == "third"
    assert names(target.parent) == ["m"]
    assert names(target) == [MARK, "model"]


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "folder"])
def test_a_file_of_the_user_in_an_output_keeps_it(tmp_path, name):
    write(tmp_path / "m", "first")
    file = tmp_path / "m" / name
    file.mkdir() if name == "folder" else file.write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds {name}, which vlft has not written here"):
        write(tmp_path / "m", "second")
    assert file.exists()
    assert (tmp_path / "m" / "model").read_text() == "first"


def test_the_target_is_looked_at_again_before_it_is_replaced(tmp_path):
    write(tmp_path / "m", "first")
    with pytest.raises(CheckpointError, match=r"holds mine\.txt"):
        write(tmp_path / "m", "second", work=(tmp_path / "m" / "mine.txt").touch)
    assert (tmp_path / "m" / "mine.txt").exists()
    with pytest.raises(CheckpointError, match="in use"):
        write(tmp_path / "n", "a", overwrite=False, work=lambda: write(tmp_path / "n2", "b") or (
            (tmp_path / "n2").rename(tmp_path / "n")))  # fmt: skip
    assert (tmp_path / "n" / "model").read_text() == "b"


def test_what_is_needed_and_what_is_no_folder_is_kept(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    for target in (base, tmp_path):
        with pytest.raises(ConfigError, match="would replace"):
            write(target, "x", needed=[base])
    monkeypatch.chdir(base)
    with pytest.raises(ConfigError, match="would replace"):
        write(tmp_path, "x")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link", "pipe"):
        with pytest.raises(CheckpointError, match="not a folder"):
            write(tmp_path / name, "x")


def test_leftovers_of_a_kill_are_removed_and_a_moved_output_comes_back(tmp_path):
    for name in (".m.0123abcd.part", ".m.0123abcd.old", ".m.x.part", ".mm.0123abcd.part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".m.0123abcd.old" / "model").write_text("first")
    (tmp_path / ".m.0123abcd.old" / MARK).write_text('{"files": ["model"]}')
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", "second", work=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert names(tmp_path) == [".m.x.part", ".mm.0123abcd.part", "m"]
    assert (tmp_path / "m" / "model").read_text() == "first"


def test_an_output_that_came_back_is_told_before_the_work(tmp_path):
    old = tmp_path / ".m.0123abcd.old"
    old.mkdir()
    (old / "model").write_text("first")
    (old / MARK).write_text('{"files": ["model"]}')
    with pytest.raises(CheckpointError, match="the output folder is in use"):
        write(tmp_path / "m", "second", overwrite=False, work=lambda: pytest.fail("worked"))
    assert names(tmp_path) == ["m"]
    assert (tmp_path / "m" / "model").read_text() == "first"


def test_the_sample_image_is_written_where_a_kill_cannot_leave_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    new = tmp_path / "new"
    vlft.convert(vlft.ConvertConfig(src=str(SIGLIP.folder), dst=new, format="transformers"))
    assert names(tmp_path) == ["new"]
    assert "sample.png" not in {path.name for path in tmp_path.rglob("*")}


@pytest.mark.parametrize("kind", ["pipe", "text", "empty", "lines"])
def test_what_is_in_the_place_of_a_lock_and_not_of_vlft_is_told_and_stays(
    tmp_path, kind, monkeypatch
):
    monkeypatch.setattr(locks, "_PATIENCE", 0.05)
    lock = tmp_path / ".new.lock"
    texts = {"text": "mine\n", "empty": "", "lines": "process 1 on a\nmine\n"}
    lock.write_text(texts[kind]) if kind in texts else os.mkfifo(lock)
    with (
        pytest.raises(CheckpointError, match=r"its lock \.new\.lock is no file that vlft has"),
        locked(lock, tmp_path / "new"),
    ):
        pass
    assert lock.read_text() == texts[kind] if kind in texts else lock.is_fifo()


def test_what_the_user_puts_in_the_place_of_a_lock_meanwhile_stays(tmp_path):
    lock = tmp_path / ".new.lock"
    with locked(lock, tmp_path / "new"):
        lock.unlink()
        lock.write_text("mine\n")
    assert lock.read_text() == "mine\n"


def test_a_lock_that_was_just_made_is_waited_for(tmp_path):
    """Its maker, who has not taken it yet, gets it."""
    lock = tmp_path / ".new.lock"
    lock.touch()
    owner = threading.Timer(0.1, lambda: lock.write_text("process 1 on elsewhere\n"))
    owner.start()
    with locked(lock, tmp_path / "new"):
        assert f"process {os.getpid()} on" in lock.read_text()
    owner.join()


def test_a_lock_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"), locked(tmp_path / ".lock", tmp_path):
        pass
    assert not names(tmp_path)


def hold(lock, ready):
    with locked(lock, lock):
        ready.set()
        time.sleep(60)


def test_a_second_process_is_told_who_writes_and_death_releases(tmp_path):
    lock = tmp_path / ".lock"
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(lock, ready))
    process.start()
    ready.wait(20)
    with (
        pytest.raises(
            CheckpointError, match=rf"another vlft writes to it \(process {process.pid} on"
        ),
        locked(lock, tmp_path),
    ):
        pass
    process.kill()
    process.join()
    with locked(lock, tmp_path):
        assert f"process {os.getpid()} on" in lock.read_text()
    assert not lock.exists()


def results(path, *, overwrite=False):
    return ResultFile(path, {"settings": {}}, [], "", form="text", overwrite=overwrite)


class TestResultFiles:
    @pytest.mark.parametrize("overwrite", [True, False])
    def test_only_what_vlft_wrote_is_replaced(self, tmp_path, overwrite):
        (tmp_path / "mine.jsonl").write_text('{"query": "q", "response": "r"}\n')
        (tmp_path / "m.settings.json").write_text('{"theme": "dark"}')
        (tmp_path / "link.jsonl").symlink_to("mine.jsonl")
        os.mkfifo(tmp_path / "pipe.jsonl")
        (tmp_path / "folder.jsonl").mkdir()
        given = ["m.jsonl", "link.jsonl", "pipe.jsonl", "folder.jsonl"]
        for name in given + ["mine.jsonl"] * overwrite:
            file = results(tmp_path / name, overwrite=overwrite)
            with (
                pytest.raises(CheckpointError, match=r"not a regular file|has not written this"),
                file.held([]),
            ):
                pass
        assert not [name for name in names(tmp_path) if name.endswith(".lock")]

    def test_data_is_not_replaced_by_answers_to_it(self, tmp_path):
        (tmp_path / "a.jsonl").touch()
        (tmp_path / "b.jsonl").symlink_to("a.jsonl")
        with (
            pytest.raises(ConfigError, match=r"b\.jsonl: is read as data"),
            results(tmp_path / "b.jsonl", overwrite=True).held([tmp_path / "a.jsonl"]),
        ):
            pass

    def test_one_process_writes(self, tmp_path):
        path = tmp_path / "new" / "a.jsonl"
        with (
            results(path).held([]),
            pytest.raises(CheckpointError, match="another vlft"),
            results(path).held([]),
        ):
            pass
        with results(path).held([]):
            pass


def test_a_copy_follows_links_into_the_hub_cache_alone(tmp_path):
    class Base:
        path = tmp_path / "models--a" / "snapshots" / "0"

    Base.path.mkdir(parents=True)
    blobs = tmp_path / "models--a" / "blobs"
    blobs.mkdir()
    (blobs / "1").write_text("published")
    (tmp_path / "secret").write_text("mine")
    (Base.path / "a.json").symlink_to(blobs / "1")
    (Base.path / "b.json").symlink_to(tmp_path / "secret")
    target = tmp_path / "copy"
    target.mkdir()
    _copy(Base, target, ["a.json", "absent.json"])
    assert (target / "a.json").read_text() == "published"
    with pytest.raises(CheckpointError, match=r"b\.json: a link to .*secret, outside"):
        _copy(Base, target, ["b.json"])
    assert names(target) == ["a.json"]


def test_tensors_are_read_of_regular_files_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(OSError, match="not a regular file"):
            open_tensors(tmp_path / name)


def test_messages_replace_no_link_and_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("circle")
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError, match=f"{name}: not a regular file"):
            write_messages(tmp_path / name, [], [], overwrite=True)


def test_messages_replace_what_vlft_wrote_alone(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"messages": [], "images": [], "source": "a:1"}\n')
    (tmp_path / "same.jsonl").hardlink_to(tmp_path / "data.jsonl")
    (tmp_path / "mine.jsonl").write_text('{"messages": [], "images": []}\n')
    (tmp_path / "text.jsonl").write_text("mine")
    data = [tmp_path / "data.jsonl"]
    for name, found in (
        ("data", "is read as data"),
        ("same", "is read as data"),
        ("mine", "vlft has not written this"),
        ("text", "vlft has not written this"),
    ):
        before = (tmp_path / f"{name}.jsonl").read_text()
        with pytest.raises(ConfigError, match=rf"--write .*{name}\.jsonl: {found}"):
            write_messages(tmp_path / f"{name}.jsonl", [], data, overwrite=True)
        assert (tmp_path / f"{name}.jsonl").read_text() == before
    write_messages(tmp_path / "data.jsonl", [], [], overwrite=True)
    assert (tmp_path / "data.jsonl").read_text() == ""


def test_a_folder_of_a_run_is_no_output(tmp_path):
    (tmp_path / "run_config.json").touch()
    with pytest.raises(ConfigError, match="checkpoint-7 is a checkpoint's name in a run"):
        write(tmp_path / "checkpoint-7", "x")
    write(tmp_path / "checkpoint-7-merged", "x")


def test_the_output_folder_of_a_run_is_tried_first(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "data.jsonl").write_text("not looked at")
    data = (str(tmp_path / "data.jsonl"),)
    for name in ("file", "file/runs"):
        with pytest.raises(ConfigError, match=r"--output-dir .*file.*cannot be written"):
            vlft.sft(vlft.SftConfig(dataset=data, output_dir=tmp_path / name))
