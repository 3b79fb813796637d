"""The command line: frozen flags, readable help, light imports, exit codes."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from vlft import __version__
from vlft.cli import app, models
from vlft.cli.commands import COMMANDS
from vlft.cli.ms_swift import ALIASES
from vlft.data.in_memory import keep_records
from vlft.families.registry import FAMILIES
from vlft.planning.published import PUBLISHED_MODELS
from vlft.settings import flag

# A new flag is a decision: it is made here, in the dataclass and in the README together.
FLAGS = {
    "sft": """
        --layout --columns --prompt --answers --preference --objects --qa
        --model --revision --hub --dtype --device --quantize --attn
        --dataset --val-dataset --mix --val-ratio --image-root --confine-images
        --allow-private-urls --exif --image-mode --max-tiles --max-image-tokens --max-length
        --on-long --on-bad-sample --loss-on --special-tokens
        --adapter --tuner --lora-target-modules --lora-rank --lora-alpha --lora-dropout --use-dora
        --use-rslora --init-lora-weights --train-aligner --train-vision --train-gen-aligner
        --train-gen-head
        --num-train-epochs --max-steps --batch-size --tokens-per-microbatch --learning-rate
        --lr-scheduler --warmup-ratio --weight-decay --max-grad-norm --gradient-checkpointing
        --compile --cfg-dropout --share-prefix --vision-cache --seed
        --output-dir --save-steps --eval-steps --eval-metric --eval-samples --save-total-limit
        --logging-steps --early-stop
        --report-to --resume --overwrite --accept-changes --show-sample
    """,
    "infer": """
        --layout --columns --prompt --answers --preference --objects --qa
        --ckpt-dir --model --revision --hub --dtype --device --quantize --attn --merge-lora
        --vision-cache --accept-changes --load-dataset-config --dataset --image --query --pdf-dpi
        --pages-per-prompt
        --image-root --confine-images
        --allow-private-urls --exif --image-mode --max-tiles --max-image-tokens
        --on-bad-sample --special-tokens --system
        --max-new-tokens --temperature --top-p --top-k --repetition-penalty --repetition-context
        --no-repeat-ngram --ngram-window
        --num-beams --stop
        --format --label-loss --batch-size --prefill-chunk --seed
        --output --save-text --overwrite --show-samples
    """,
    "serve": """
        --ckpt-dir --model --revision --hub --dtype --device --quantize --attn --accept-changes
        --allow-private-urls --exif --image-mode --max-tiles --max-image-tokens --special-tokens
        --max-new-tokens --temperature --repetition-penalty --no-repeat-ngram --ngram-window
        --batch-size --prefill-chunk
        --host --port --api-key --max-request-mb --max-images --max-image-pixels --max-queue
        --stop-timeout
    """,
    "check": """
        --layout --columns --prompt --answers --preference --objects --qa
        DATASET --val-dataset --model --max-length --image-root --confine-images
        --allow-private-urls --on-bad-sample --loss-on --seed
        --write --overwrite --json
    """,
    "data": """
        SRC --image-root --prompt --boxes --box-format --on-bad-sample --output --overwrite
    """,
    "draw": """
        --ckpt-dir --model --revision --hub --dtype --device --quantize --attn --merge-lora
        --accept-changes --prompt --load-dataset-config --dataset --reconstruct
        --image-root --confine-images --allow-private-urls
        --on-bad-sample --num-images --cfg-weight --temperature --batch-size --seed
        --output-dir --overwrite
    """,
    "merge-lora": """
        --ckpt-dir --model --revision --hub --base --device --accept-changes
        --output-dir --format --dtype --max-shard-size --overwrite
    """,
    "convert": """
        SRC DST --revision --hub --model-roles
        --format --dtype --max-shard-size --overwrite
    """,
    "push": "FOLDER REPO --run --public --overwrite",
    "models": "",
    "cache": "ACTION",
    "demo": "--output-dir --quick",
    "env": "--json",
    "report": "RUNS --output",
}
# The same, so that a run is planned, and answers are made, with their own flags.
FLAGS["plan"] = FLAGS["sft"] + "--gpu"
FLAGS["app"] = FLAGS["serve"]
FLAGS["eval"] = FLAGS["infer"] + "--results --metric --references --json"


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    """Imports what takes long: a command that has to says so, before all else."""
    for command in COMMANDS.values():
        importlib.import_module(command.work.partition(":")[0])


def run(monkeypatch, capfd, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["vlft", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        app.main()
    captured = capfd.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_frozen(command):
    fields = dataclasses.fields(COMMANDS[command].config)
    names = [f.name.upper() if f.metadata["argument"] else flag(f.name) for f in fields]
    assert names == FLAGS[command].split()


@pytest.mark.parametrize("command", FLAGS)
def test_help_reads_well_at_80_columns(monkeypatch, capfd, command):
    code, text, _ = run(monkeypatch, capfd, command, "--help")
    assert code == 0
    assert run(monkeypatch, capfd, command, "-h")[1] == text
    assert max(map(len, text.splitlines())) <= 80
    for name in FLAGS[command].split():
        assert name in text.replace("[no-]", ""), name
    for spec in dataclasses.fields(COMMANDS[command].config):
        assert spec.metadata["help"].split()[0] in text
    assert "…" not in text
    # Our own spelling alone.
    aliases = " ".join(ALIASES.values()).split()
    others = {f"--{alias}" for alias in aliases} | {flag(alias) for alias in aliases}
    assert not any(f"{other} " in text for other in others - set(FLAGS[command].split()))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_commands(monkeypatch, capfd, arguments):
    assert FLAGS.keys() == COMMANDS.keys()
    code, text, err = run(monkeypatch, capfd, *arguments)
    assert (code, err) == (0, "")
    # As the pages of the commands: usage, purpose, then a line for each name.
    assert text.startswith("Usage: vlft COMMAND [OPTIONS]\n\nFine-tune")
    lines = [line.rstrip() for line in text.splitlines()]
    for name, command in COMMANDS.items():
        assert f"{name:12}{command.help}" in lines
    assert max(map(len, lines)) <= 80


def test_version(monkeypatch, capfd):
    assert run(monkeypatch, capfd, "--version")[:2] == (0, f"vlft {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft"], "--dataset: no training data given"),
        (["sft", "--dataset", "a.jsonl", "--lora-rank", "0"], "--lora-rank: found 0, at least 1"),
        (["merge-lora"], "--ckpt-dir: no adapter given"),
        (["infer", "--ckpt-dir", "nowhere"], "nowhere: no such folder"),
        (["sft", "--config", "nowhere.json"], "nowhere.json: cannot be read"),
        (["convert", "a"], "vlft convert: two folders are needed"),
        (["convert", "nowhere", "b"], "--model nowhere: no such folder"),
        (["cache", "clean"], "ACTION: found 'clean'"),
        (["plan", "--gpu", "4091"], "--gpu: found '4091'\n hint: a size like 24GB, or t4, l4"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(monkeypatch, capfd, arguments, message):
    code, text, err = run(monkeypatch, capfd, *arguments)
    assert code == 2
    assert text == ""
    assert err.startswith(f"error: {message}")
    assert "Traceback" not in err


@pytest.mark.parametrize("gpu", ["4090", "RTX 4090"])
def test_a_gpu_by_its_name(monkeypatch, capfd, gpu):
    model = "deepseek-ai/deepseek-vl-1.3b-chat"
    code, text, _ = run(monkeypatch, capfd, "plan", "--model", model, "--gpu", gpu)
    assert code == 0
    assert f"fits on {gpu} (24 GiB)" in text


def test_models(monkeypatch, capfd):
    code, text, _ = run(monkeypatch, capfd, "models")
    assert code == 0
    assert all(known.id in text for known in PUBLISHED_MODELS)
    assert {family.name for family in FAMILIES} == models.HEADINGS.keys()
    both = {family.name: family.has_transformers_layout for family in FAMILIES}
    for known in PUBLISHED_MODELS:
        (line,) = (line for line in text.splitlines() if line.startswith(f"{known.id} "))
        assert line.split()[-1] == ("both" if both[known.family] else "original")
    assert max(map(len, text.splitlines())) <= 80


def test_cache(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "vlft" / "features" / "abc"
    folder.mkdir(parents=True)
    (folder / "1.safetensors").write_bytes(bytes(3 * 2**20))
    records = Path(keep_records([{"query": "q" * 2**20, "images": [Image.new("L", (9, 9))]}]))
    code, text, _ = run(monkeypatch, capfd, "cache", "info")
    assert code == 0
    assert text.startswith(
        "abc                                   1 file          3.0 MiB\n"
        "images                                1 file          0.0 MiB\n"
        "datasets                              2 files         1.0 MiB\n"
    )
    assert "vlft: 4.0 MiB" in text
    assert "4.0 MiB removed" in run(monkeypatch, capfd, "cache", "clear")[1]
    assert not folder.exists()
    assert not records.exists()
    assert run(monkeypatch, capfd, "cache")[1].endswith("vlft: 0.0 MiB\n")


def test_debug_shows_the_traceback(monkeypatch, capfd):
    code, _, err = run(monkeypatch, capfd, "merge-lora", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "error: --ckpt-dir: no adapter given" in err


def test_an_unknown_flag_is_answered_with_near_ones(monkeypatch, capfd):
    code, _, err = run(monkeypatch, capfd, "sft", "--lora-rnk", "8")
    assert code == 2
    assert "--lora-rank" in err


def test_flags_win_over_the_file(monkeypatch, capfd, tmp_path):
    seen = []
    monkeypatch.setattr("vlft.training.run.run_sft", lambda *a: seen.append(a) or Finished())
    file = tmp_path / "settings.yaml"
    file.write_text("dataset: a.jsonl\nlearning-rate: 1e-3\nlora_rank: 4\n")
    run_ok(monkeypatch, "sft", "--config", str(file), "--lora-rank", "2", "--no-show-sample")
    config, written = seen[0]
    assert (config.lora_rank, config.learning_rate, config.dataset) == (2, 1e-3, ("a.jsonl",))
    assert config.show_sample is False
    assert written == {"dataset", "learning_rate", "lora_rank", "show_sample"}


class Finished:
    finished = True


def run_ok(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vlft", *arguments])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code in (0, None)


HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "matplotlib", "numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["sft", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from vlft.cli.app import main\n"
        f"sys.argv = ['vlft', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_first_line_does_not_wait_for_torch(tmp_path):
    """It is there in a small part of the time that the imports take, on stderr."""
    start = time.monotonic()
    command = [sys.executable, "-m", "vlft", "infer", "--ckpt-dir", "nowhere"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        first = process.stderr.readline()
        waited = time.monotonic() - start
        rest, text = process.stderr.read(), process.stdout.read()
    assert first == f"vlft {__version__}: loading torch and transformers\n"
    assert waited < (time.monotonic() - start) / 2
    assert (rest.splitlines()[0], text) == ("error: nowhere: no such folder", "")


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, vlft; print([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_m_vlft():
    done = subprocess.run(
        [sys.executable, "-m", "vlft", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"vlft {__version__}\n"


def test_without_the_tiny_model_a_model_is_required(monkeypatch, capfd):
    monkeypatch.setattr("vlft.checkpoints.locate.TINY_MODEL", Path("/nowhere/tiny-vl"))
    code, _, err = run(monkeypatch, capfd, "sft", "--dataset", "a.jsonl")
    assert code == 2
    assert "--model: no model is named, and the tiny model is not at /nowhere/tiny-vl" in err


def test_a_ctrl_c_in_a_callback_is_not_lost():
    """Python drops what ``__del__`` and callbacks of weak references raise."""
    code = (
        "import signal, time\n"
        "from vlft.cli import app\n"
        # A background job of a shell inherits that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Callback:\n"
        "    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "def work():\n"
        "    Callback()\n"
        "    time.sleep(60)\n"
        "app.app = work\n"
        "app.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 130
    assert done.stderr == "error: stopped; what was saved before is whole\n"
