"""Real runs, killed at random moments, go on to the same adapter, bit for bit.

The moments are spread over the whole run: reading, encoding images, steps, saving. ``--kills N``
asks for more than the three of the default run; ``make torture`` asks for sixty. The moments that
chance seldom finds (in an evaluation, while a checkpoint is removed) have tests of their own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import subprocesses
import torch
from conftest import GOLDEN, SIGLIP, make_rows, write_jsonl
from launched import finish, launch, metrics, run_of, small_config
from PIL import Image
from safetensors.torch import load_file

import vlft
from vlft.checkpoints.runs import checkpoints_in, find_checkpoint
from vlft.settings import to_json
from vlft.training.run import LOCK

if TYPE_CHECKING:
    import multiprocessing
    from collections.abc import Callable
    from pathlib import Path

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Printed when the data is read and the model is loaded, before any image is encoded.
STARTED = "validation samples"
# Five samples, two batches of an evaluation.
VALIDATION = 0.31


@dataclass(frozen=True)
class Trial:
    """One kill.

    Attributes:
        number: of the trial; also its seed.
        signal: sent once.
        moment: seconds after the run has started.
    """

    number: int
    signal: signal.Signals
    moment: float


def settings_of(home: Path) -> vlft.SftConfig:
    """A run of a few seconds: images to encode, and a checkpoint after every step."""
    generator = random.Random(0)
    many = []
    for number in range(240):
        path = home / f"{number}.png"
        Image.frombytes("RGB", (48, 48), generator.randbytes(48 * 48 * 3)).save(path)
        many.append(str(path))
    # Enough images that encoding takes a part of the time.
    more = [
        {"query": "<image>" * 40 + "How many?", "response": "40", "images": many[at : at + 40]}
        for at in range(0, len(many), 40)
    ]
    data = write_jsonl(home / "train.jsonl", make_rows(10) + more)
    return vlft.SftConfig(
        model=str(SIGLIP.folder), dataset=(str(data),), image_root=GOLDEN / "images",
        val_ratio=VALIDATION, output_dir=home / "output", batch_size=3, num_train_epochs=1,
        save_steps=1, save_total_limit=2, learning_rate=1e-2, lora_dropout=0.1, show_sample=False,
    )  # fmt: skip


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run) / "adapter_model.safetensors")


def run_folders(home: Path) -> list[Path]:
    return sorted((home / "output").glob("*/v*"))


def start(
    home: Path, cache: Path, before: Callable[[], None] | None = None, **changes: object
) -> multiprocessing.Process:
    """A run, with its own features and its own log."""
    file = home / "settings.json"
    file.write_text(json.dumps(to_json(replace(settings_of(home), **changes))))
    arguments = ["sft", "--config", str(file)]
    return subprocesses.start(arguments, home / "errors.txt", before, XDG_CACHE_HOME=str(cache))


def wait_for_start(process: multiprocessing.Process, home: Path) -> None:
    deadline, log = time.monotonic() + 120, home / "errors.txt"
    while not (log.exists() and STARTED in log.read_text()):
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill(home: Path, cache: Path, trial: Trial) -> bool:
    """Starts a run and sends the signal; False if the run was faster."""
    process = start(home, cache)
    wait_for_start(process, home)
    time.sleep(trial.moment)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, trial.signal)
    process.join(60)
    errors = (home / "errors.txt").read_text()
    assert process.exitcode is not None, errors
    assert "Traceback" not in errors, errors
    return alive


def phase(home: Path, cache: Path) -> str:
    """What the signal found: for people who read the output."""
    for run in run_folders(home)[-1:]:
        if list(run.glob(".checkpoint-*")):
            return "while saving"
        if checkpoints_in(run):
            return f"after checkpoint-{checkpoints_in(run)[-1][0]}"
    return "before step 1, images " + ("encoded" if list(cache.rglob("*.safe*")) else "not encoded")


def go_on(home: Path) -> Path:
    """Resumes, or starts again where nothing was saved yet; returns the run folder."""
    saved = [run for run in run_folders(home) if checkpoints_in(run)]
    result = vlft.sft(vlft.SftConfig(resume=saved[-1]) if saved else settings_of(home))
    assert result.finished
    return result.run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The adapter of a run that nobody disturbed, and how long it took from its start on."""
    home = tmp_path_factory.mktemp("whole")
    process = start(home, home / "cache")
    wait_for_start(process, home)
    started = time.monotonic()
    process.join(120)
    assert process.exitcode == 0, (home / "errors.txt").read_text()
    return adapter(run_folders(home)[0]), time.monotonic() - started


def test_a_killed_run_goes_on_to_the_same_bits(whole, kills, tmp_path, monkeypatch):
    expected, seconds = whole
    generator = random.Random(20)
    done, found = 0, []
    for number in range(10 * kills):
        home, cache = tmp_path / str(number), tmp_path / f"cache-{number}"
        home.mkdir()
        # Evenly over the run, so that no part is left out; a third while images are encoded.
        share = (done + generator.random()) / kills * 0.95
        share = generator.random() * 0.12 if done % 3 == 0 else share
        trial = Trial(number, generator.choice(SIGNALS), share * seconds)
        if not kill(home, cache, trial):
            # It ended before the signal: the machine was busier when the undisturbed run was timed.
            seconds *= 0.7
            continue
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        found.append((f"{trial.signal.name} at {trial.moment:.2f} s", phase(home, cache)))
        run = go_on(home)
        state = adapter(run)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected), trial
        assert {path.name for path in run.glob(".*")} <= {LOCK}
        done += 1
        if done == kills:
            break
    print(*(f"{what}: {where}" for what, where in found), sep="\n")
    assert done == kills, f"the run was faster than the signal too often: {found}"


def in_an_evaluation(number: int) -> None:
    """Sends this process a signal in an evaluation, between two of its rows."""
    from vlft.training import loop

    row_loss, seen = loop.row_loss, []

    def row_loss_and_signal(job, row):
        if not torch.is_grad_enabled():
            seen.append(row)
            if len(seen) == 3:
                os.kill(os.getpid(), number)
        return row_loss(job, row)

    loop.row_loss = row_loss_and_signal


def while_a_checkpoint_is_removed(number: int) -> None:
    """Sends this process a signal when a checkpoint has lost its first file."""
    remove, files = os.unlink, ["adapter_model.safetensors", "adapter_config.json"]

    def remove_and_signal(path, *given, **options):
        remove(path, *given, **options)
        if str(path) in files:
            files.clear()
            os.kill(os.getpid(), number)

    os.unlink = remove_and_signal


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", [in_an_evaluation, while_a_checkpoint_is_removed])
def test_a_stop_at_a_moment_that_chance_seldom_finds(
    whole, tmp_path, monkeypatch, number, moment, kills
):
    if kills <= 3 and number in (signal.SIGTERM, signal.SIGINT):
        pytest.skip("with --kills above 3")
    cache = tmp_path / "cache"
    # With one checkpoint to keep, the first is removed after the second step of four.
    process = start(tmp_path, cache, partial(moment, number), save_total_limit=1)
    process.join(120)
    errors = (tmp_path / "errors.txt").read_text()
    assert "Traceback" not in errors, errors
    assert process.exitcode == (-9 if number == signal.SIGKILL else 130), errors
    (run,) = run_folders(tmp_path)
    for _, folder in checkpoints_in(run):
        assert load_file(folder / "adapter_model.safetensors").keys() == whole[0].keys()
        assert load_file(folder / "state" / "state.safetensors")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    state = adapter(go_on(tmp_path))
    assert all(torch.equal(state[name], tensor) for name, tensor in whole[0].items())
    assert {path.name for path in run.glob(".*")} <= {LOCK}


def in_an_evaluation_of_rank_one(number: int) -> None:
    if os.environ["RANK"] == "1":
        in_an_evaluation(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_two_ranks_stop_in_an_evaluation(tmp_path, number):
    """One of them is asked; both abandon it, and one process makes up for it."""
    config = replace(small_config(SIGLIP, tmp_path), val_ratio=0.5, eval_steps=1)
    alone = vlft.sft(replace(config, output_dir=tmp_path / "alone")).run
    home = tmp_path / "two"
    ranks = launch(config, home, partial(in_an_evaluation_of_rank_one, number))
    assert finish(ranks, home) == [130, 130]
    run = run_of(config)
    assert metrics(run, "val_loss") == pytest.approx(metrics(alone, "val_loss")[:1], rel=1e-4)
    assert len(checkpoints_in(run)) == 1
    assert vlft.sft(vlft.SftConfig(resume=run)).finished
    for name in ("loss", "val_loss"):
        assert metrics(run, name) == pytest.approx(metrics(alone, name), rel=1e-3), name


@pytest.fixture
def small_disk(tmp_path, request):
    """A disk, of the size in the parameter, and a function that makes it larger.

    By default it holds two checkpoints and not many more.
    """
    place, size = tmp_path / "output", getattr(request, "param", "500k")
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")

    def enlarge():
        subprocess.run(["mount", "-o", "remount,size=50m", str(place)], check=True)

    yield enlarge
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_loses_nothing(whole, small_disk, tmp_path, monkeypatch):
    """It is said, every checkpoint that is there is whole, and with more room the run goes on."""
    process = start(tmp_path, tmp_path / "cache", save_total_limit=100)
    process.join(120)
    errors = (tmp_path / "errors.txt").read_text()
    assert process.exitcode == 1, errors
    assert "No space left on device" in errors
    assert "make room, then go on with: vlft sft --resume" in errors
    assert "Traceback" not in errors
    (run,) = run_folders(tmp_path)
    assert len(checkpoints_in(run)) >= 2
    for _, folder in checkpoints_in(run):
        assert load_file(folder / "adapter_model.safetensors").keys() == whole[0].keys()
        assert load_file(folder / "state" / "state.safetensors")
    assert (run / "last").exists()
    small_disk()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = adapter(go_on(tmp_path))
    assert all(torch.equal(state[name], tensor) for name, tensor in whole[0].items())


@pytest.mark.parametrize("small_disk", ["4k", "8k", "60k", "100k"], indirect=True)
def test_a_disk_without_room_for_a_checkpoint(
    whole, small_disk, tmp_path, monkeypatch, kills, request
):
    if kills <= 3:
        pytest.skip("with --kills above 3")
    size = request.node.callspec.params["small_disk"]
    process = start(tmp_path, tmp_path / "cache")
    process.join(120)
    errors = (tmp_path / "errors.txt").read_text()
    assert process.exitcode == 1, errors
    assert "No space left on device" in errors
    assert "make room, then start again" in errors
    assert "Traceback" not in errors
    # Of a run that could not begin nothing is there, else what it has said so far.
    for run in run_folders(tmp_path):
        assert (run / "run_config.json").exists()
        assert not list(run.glob(".*"))
    assert bool(run_folders(tmp_path)) == (size not in ("4k", "8k"))
    small_disk()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = adapter(go_on(tmp_path))
    assert all(torch.equal(state[name], tensor) for name, tensor in whole[0].items())


def test_two_at_once(whole, tmp_path, kills):
    """One of them goes on with the run; the other is told, or comes after it."""
    if kills <= 3:
        pytest.skip("with --kills above 3")
    process = start(tmp_path, tmp_path / "cache", save_total_limit=100)
    process.join(120)
    (run,) = run_folders(tmp_path)
    generator = random.Random(0)
    for _ in range(kills // 6):
        for step, folder in checkpoints_in(run):
            if step > 1:
                shutil.rmtree(folder)
        logs, processes = [tmp_path / "first.txt", tmp_path / "second.txt"], []
        for log in logs:
            log.unlink(missing_ok=True)
            words = ["sft", "--resume", str(run)]
            cache = str(tmp_path / "cache")
            processes.append(subprocesses.start(words, log, XDG_CACHE_HOME=cache))
            time.sleep(generator.random() * 0.3)
        for process in processes:
            process.join(120)
        errors = [log.read_text() for log in logs]
        codes = [process.exitcode for process in processes]
        assert "Traceback" not in "".join(errors), errors
        assert 0 in codes, errors
        holders = [f"another vlft writes to it (process {one.pid} on" for one in processes]
        for code, said in zip(codes, errors, strict=True):
            assert code == 0 or (code == 2 and any(holder in said for holder in holders)), errors
        state = adapter(run)
        assert all(torch.equal(state[name], tensor) for name, tensor in whole[0].items())
        assert not list(run.glob(".*"))


def test_a_difference_would_be_seen(whole, tmp_path):
    """Another seed gives another adapter."""
    run = vlft.sft(replace(settings_of(tmp_path), seed=1)).run
    assert any(not torch.equal(tensor, whole[0][name]) for name, tensor in adapter(run).items())
