"""Merging, converting and answering, killed at random moments: outputs are whole or absent.

Half of the moments are chosen after the output has begun to appear. After each kill the same
command runs again, and its output equals that of a run that nobody disturbed. ``--kills N`` asks
for two thirds of N kills of each command; ``make torture`` asks for forty. Disks of several sizes
are filled, and two processes write one output.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hostile
import pytest
from conftest import GOLDEN, SIGLIP, write_jsonl

import vlft

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Of the output, or of the folder that holds it.
Content = dict[str, bytes]


@dataclass(frozen=True)
class Command:
    """A command that writes an output.

    Attributes:
        words: of the command line, without the output.
        flag: before the output; empty if the output is the last word.
        output: its name.
        earlier: other words, which give another output.
    """

    words: list[str]
    flag: str
    output: str
    earlier: list[str]

    def line(self, place: Path, *, overwrite: bool, earlier: bool = False) -> list[str]:
        """The command line that writes to a folder."""
        target = [self.flag, str(place / self.output)][not self.flag :]
        options = (["--overwrite"] * overwrite) + (self.earlier if earlier else [])
        return [*self.words, *target, *options]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, Command]:
    """The commands, with the run and the data that they read."""
    home = tmp_path_factory.mktemp("inputs")
    rows = [
        {"query": f"<image>What is number {number}?", "response": "It is.", "images": [image]}
        for number, image in enumerate(["photo_a.jpg", "photo_b.jpg", "chart.png"] * 2)
    ]
    data = write_jsonl(home / "data.jsonl", rows)
    # With labels that fill pages of a disk.
    questions = write_jsonl(
        home / "questions.jsonl", [{**row, "response": "It is. " * 200} for row in rows]
    )
    run = vlft.sft(
        vlft.SftConfig(
            model=str(SIGLIP.folder), dataset=(str(data),), image_root=GOLDEN / "images",
            output_dir=home, max_steps=1, batch_size=2, learning_rate=1e-2, lora_rank=2,
            show_sample=False, vision_cache="memory",
        )
    ).run  # fmt: skip
    # What merging imports is in this process from here on, and so in those that it forks.
    vlft.merge_lora(vlft.MergeLoraConfig(ckpt_dir=run, output_dir=home / "merged"))
    shards = ["--max-shard-size", "400KB"]
    answers = [
        "infer", "--ckpt-dir", str(run), "--dataset", str(questions), "--image-root",
        str(GOLDEN / "images"), "--max-new-tokens", "3", "--batch-size", "1", "--device", "cpu",
    ]  # fmt: skip
    other = ["--dtype", "bfloat16"]
    return {
        "merge": Command(
            ["merge-lora", "--ckpt-dir", str(run), *shards], "--output-dir", "m", other
        ),
        "convert": Command(["convert", *shards, str(SIGLIP.folder)], "", "m", other),
        "infer": Command(answers, "--output", "a.jsonl", ["--seed", "1"]),
    }


class Bench:
    """A folder for the outputs of one command at a time.

    Attributes:
        place: where the command writes.
    """

    def __init__(self, home: Path) -> None:
        self.place, self._user, self._log = home / "place", home / "user", home / "log"
        self.empty()

    def empty(self) -> None:
        """Removes what is there."""
        for folder in (self.place, self._user):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.place, self._user / "tmp", self._user / "cache", self._user / "here"):
            folder.mkdir(parents=True)

    @contextmanager
    def small_disk(self, size: str) -> Iterator[Callable[[], None]]:
        """Has the place be a disk of that size, and gives a function that makes it larger."""
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.place)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        try:
            larger = ["mount", "-o", "remount,size=50m", str(self.place)]
            yield lambda: subprocess.run(larger, check=True) and None
        finally:
            subprocess.run(["umount", str(self.place)], check=True)

    def put(self, content: Content) -> None:
        """Puts an earlier output there."""
        for name, data in content.items():
            path = self.place / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def start(self, words: list[str], number: int = 0, largest: int = hostile.LARGEST) -> int:
        log = self._log.with_name(f"log-{number}")
        return hostile.start(words, log, self._user, largest)

    def end(self, process: int, number: int = 0) -> tuple[int, str]:
        """Waits for a process; returns its exit code and what it wrote to stderr."""
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        errors = self._log.with_name(f"log-{number}").read_text()
        assert "Traceback" not in errors, errors
        assert "a fault of vlft" not in errors, errors
        return code, errors

    def run(self, words: list[str], largest: int = hostile.LARGEST) -> tuple[int, str]:
        return self.end(self.start(words, largest=largest))

    def content(self) -> Content:
        """Every file, hidden ones too, by its path below the place; nothing is in TMPDIR."""
        assert not list((self._user / "tmp").iterdir())
        return {
            str(path.relative_to(self.place)): path.read_bytes()
            for path in sorted(self.place.rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


@dataclass(frozen=True)
class Undisturbed:
    """What a command writes if nobody disturbs it.

    Attributes:
        new: output.
        earlier: output of an earlier command, which ``--overwrite`` replaces.
        seconds: that it took.
        begun: seconds until its output began to appear.
    """

    new: Content
    earlier: Content
    seconds: float
    begun: float


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory) -> Callable[[str], Undisturbed]:
    """A function that knows them by the name of the command."""
    known = {}

    def of(name: str) -> Undisturbed:
        if name not in known:
            known[name] = _undisturbed(commands[name], Bench(tmp_path_factory.mktemp(name)))
        return known[name]

    return of


def _undisturbed(command: Command, bench: Bench) -> Undisturbed:
    code, errors = bench.run(command.line(bench.place, overwrite=False, earlier=True))
    assert code == 0, errors
    earlier = bench.content()
    bench.empty()
    started = time.monotonic()
    process = bench.start(command.line(bench.place, overwrite=False))
    wait_for_output(bench.place, {})
    begun = time.monotonic() - started
    code, errors = bench.end(process)
    assert code == 0, errors
    return Undisturbed(bench.content(), earlier, time.monotonic() - started, begun)


def names(place: Path) -> set[str]:
    return {path.name for path in place.iterdir() if not path.name.endswith(".lock")}


def wait_for_output(place: Path, before: Content) -> None:
    """Waits for a name in the folder that was not there before; a lock is none."""
    deadline, known = time.monotonic() + 60, {name.split("/")[0] for name in before}
    while names(place) <= known:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def check_what_a_kill_left(found: Content, expected: Undisturbed, output: str) -> str:
    """The output is the earlier one, the new one, or absent; an earlier one is never lost."""
    there = {name: data for name, data in found.items() if not name.startswith(".")}
    if output.endswith(".jsonl"):
        # Answers are appended; the last line may be cut off.
        lines = there.get(output, b"")
        is_earlier = bool(expected.earlier) and there == expected.earlier
        assert is_earlier or expected.new[output].startswith(lines)
        whole = {name: data for name, data in there.items() if name != output}
        headers = [expected.new, expected.earlier]
        assert all(any(data == one.get(name) for one in headers) for name, data in whole.items())
        return "earlier" if is_earlier else f"{len(lines.splitlines())} lines"
    if not there:
        aside = {
            name.split("/", 1)[1]: data
            for name, data in found.items()
            if name.split("/")[0].endswith(".old")
        }
        kept = {name.split("/", 1)[1]: data for name, data in expected.earlier.items()}
        assert aside == kept
        return "moved aside" if kept else "absent"
    assert there in (expected.earlier, expected.new)
    return "new" if there == expected.new else "earlier"


COMMANDS = ["merge", "convert", "infer"]


def skip_merge(name: str, kills: int) -> None:
    """Merging writes as converting does, and takes longer."""
    if name == "merge" and kills <= 3:
        pytest.skip("with --kills above 3")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_the_old_or_the_new(name, commands, undisturbed, kills, bench):
    command, usual = commands[name], undisturbed(name)
    generator, count, seen = random.Random(name), max(1, kills * 2 // 3), list[str]()
    speed = 1.0
    for _ in range(10 * count):
        done = len(seen)
        # All four combinations with whether the output has appeared.
        overwrite = bool(done // 2 % 2) if count > 2 else not done % 2
        expected = Undisturbed(usual.new, usual.earlier if overwrite else {}, 0, 0)
        bench.empty()
        bench.put(expected.earlier)
        line = command.line(bench.place, overwrite=overwrite)
        process = bench.start(line)
        share = generator.random()
        if done % 2 == 0:
            wait_for_output(bench.place, expected.earlier)
            time.sleep(speed * share * (usual.seconds - usual.begun))
        else:
            time.sleep(speed * share * usual.seconds)
        os.kill(process, signal.SIGKILL)
        code, errors = bench.end(process)
        if code == 0:
            # It ended before the signal: the machine was busier when the undisturbed run was timed.
            speed *= 0.7
            continue
        assert code == -signal.SIGKILL, errors
        where = check_what_a_kill_left(bench.content(), expected, command.output)
        seen.append(f"{'overwrite, ' * overwrite}{where}, {len(errors.splitlines())} lines said")
        code, errors = bench.run(line)
        if where == "new" and not overwrite:
            assert (code, "the output folder is in use" in errors) == (2, True), errors
        else:
            assert code == 0, errors
        assert bench.content() == usual.new
        if len(seen) == count:
            break
    print(*seen, sep="\n")
    assert len(seen) == count, f"the command was faster than the signal too often: {seen}"


def after(monkeypatch, owner: type, name: str, count: int) -> None:
    """Kills the process that calls a method of paths for the N-th time on an output, after that."""
    method, calls = getattr(owner, name), []

    def call_and_die(path: Path, *given: object, **options: object) -> object:
        result = method(path, *given, **options)
        calls.append(path)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(owner, name, call_and_die)


@pytest.mark.parametrize(
    ("name", "method", "count", "where"),
    [
        ("convert", "rename", 1, "moved aside"),
        ("convert", "rename", 2, "new"),
        ("infer", "replace", 1, "0 lines"),
    ],
)
def test_a_kill_at_a_moment_that_chance_seldom_finds(
    name, method, count, where, commands, undisturbed, bench, monkeypatch
):
    command, expected = commands[name], undisturbed(name)
    bench.put(expected.earlier)
    line = command.line(bench.place, overwrite=True)
    with monkeypatch.context() as patch:
        after(patch, Path, method, count)
        assert bench.run(line)[0] == -signal.SIGKILL
    assert check_what_a_kill_left(bench.content(), expected, command.output) == where
    assert bench.run(line)[0] == 0
    assert bench.content() == expected.new


# A file of one page takes 4 kB, the lock and the header of answers too. A model takes about 2.3 MB.
SIZES = {
    "merge": ["1500k", "2200k", "500k", "100k", "4k"],
    "convert": ["500k", "2200k", "1500k", "100k", "4k"],
    "infer": ["12k", "16k", "8k", "4k"],
}


def check_full_disk(code: int, errors: str, reason: str) -> None:
    assert code == 1, errors
    assert reason in errors
    assert "make room, then run the command again" in errors


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name, commands, undisturbed, bench, kills):
    """It is said, nothing is left of what was begun, and with room the output is whole."""
    command, expected = commands[name], undisturbed(name)
    skip_merge(name, kills)
    for size in SIZES[name][: 1 if kills <= 3 else None]:
        with bench.small_disk(size) as enlarge:
            line = command.line(bench.place, overwrite=False)
            check_full_disk(*bench.run(line), "No space left on device")
            found = bench.content()
            if name == "infer":
                # Answers that wait for earlier ones are kept.
                found.pop(".a.jsonl.waiting", None)
                assert expected.new["a.jsonl"].startswith(found.pop("a.jsonl", b""))
                assert found.pop("a.settings.json", None) in (None, expected.new["a.settings.json"])
            assert not found
            enlarge()
            assert bench.run(line)[0] == 0
            assert bench.content() == expected.new


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_may_not_grow_keeps_the_earlier_output(
    name, commands, undisturbed, bench, kills
):
    skip_merge(name, kills)
    command, expected = commands[name], undisturbed(name)
    bench.put(expected.earlier)
    line = command.line(bench.place, overwrite=True)
    check_full_disk(*bench.run(line, largest=1000 if name == "infer" else 50_000), "File too large")
    assert bench.content() == expected.earlier


@pytest.mark.parametrize("name", COMMANDS)
def test_two_at_once(name, commands, undisturbed, bench, kills):
    """One writes; the other is told, or finds the output of the first."""
    skip_merge(name, kills)
    command, expected = commands[name], undisturbed(name)
    line, generator = command.line(bench.place, overwrite=False), random.Random(name)
    for _ in range(1 if kills <= 3 else kills // 6):
        bench.empty()
        first = bench.start(line, 1)
        time.sleep(generator.random() * 0.1 * expected.seconds)
        second = bench.start(line, 2)
        ends = sorted([bench.end(first, 1), bench.end(second, 2)])
        assert ends[0][0] == 0, ends
        code, errors = ends[1][0], ends[0][1] + ends[1][1]
        told = f"another vlft writes to it (process {first} on" in errors
        told |= f"another vlft writes to it (process {second} on" in errors
        there = "in use" in errors if code else "6 of 6 records already" in errors
        assert code in (0, 2), ends
        assert told or there, ends
        assert bench.content() == expected.new
