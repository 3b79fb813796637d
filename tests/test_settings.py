"""Values from flags, files and Python -> one checked dataclass, and all that is wrong at once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.serialization._base import parse_size_to_int

import vlft
from vlft.cli.config_file import read_config_file
from vlft.cli.options import read_settings
from vlft.config import (
    ConvertConfig,
    InferConfig,
    MergeLoraConfig,
    PlanConfig,
    SftConfig,
)
from vlft.errors import CollectedError, ConfigError, UsageError, raise_all
from vlft.files import sample_folder
from vlft.gpus import GPUS, gpu_gib
from vlft.inference.generate import Sampling
from vlft.settings import (
    Settings,
    build,
    check,
    convert,
    field_type,
    flag,
    setting,
    to_json,
)
from vlft.training.lora import LoraOptions

CONFIGS = {
    SftConfig: {"dataset": ["a.jsonl"]},
    InferConfig: {"dataset": ["a.jsonl"]},
    MergeLoraConfig: {"ckpt_dir": "run"},
}
# Settings that stand with others than a data file.
NEEDED = {
    name: {"image": ["a.png"], "query": "?", "dataset": []}
    for name in ("query", "pdf_dpi", "pages_per_prompt", "save_text")
}
each_config = pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)


@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    """One field of each kind."""

    whole: int = setting(3, "", panel="", minimum=1, maximum=9)
    maybe: int | None = setting(None, "", panel="", minimum=1)
    real: float = setting(0.5, "", panel="", above=0, maximum=1)
    yes: bool = setting(False, "", panel="")
    perhaps: bool | None = setting(None, "", panel="")
    word: str = setting("a", "", panel="", choices=("a", "b"))
    text: str | None = setting(None, "", panel="")
    path: Path | None = setting(None, "", panel="")  # noqa: RUF009 (as in vlft/config)
    words: tuple[str, ...] = setting((), "", panel="")

    def rules(self):
        return (
            (self.yes and self.word == "b", "--yes", "not with b", ""),
            (self.yes and self.maybe, "--yes", "not with a number", ""),
            (self.yes and self.text, "--text", "yes is given", None),
        )


def read(cls: type, values: dict[str, Any], source: str) -> None:
    raise_all(convert(cls, values, source=source)[1])
    build(cls, values)


def message(values: dict[str, Any], cls: type = Demo, source: str = "") -> str:
    with pytest.raises(UsageError) as error:
        read(cls, values, source)
    return str(error.value)


@pytest.mark.parametrize(("name", "value"), [("output_dir", "a\0b"), ("dataset", ["a", "b\0"])])
def test_no_path_has_a_nul(name, value):
    with pytest.raises(ConfigError, match="a path without NUL is allowed"):
        build(SftConfig, {name: value})


class TestBuild:
    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("whole", 7, 7),
            ("maybe", None, None),
            ("maybe", 10**12, 10**12),
            ("real", 1, 1.0),
            ("real", "1e-4", 1e-4),
            ("real", " .25 ", 0.25),
            ("yes", True, True),
            ("perhaps", False, False),
            ("perhaps", None, None),
            ("word", "b", "b"),
            ("text", "", ""),
            ("path", "a/b", Path("a/b")),
            ("path", Path("a"), Path("a")),
            ("words", "one", ("one",)),
            ("words", ["a", "b"], ("a", "b")),
            ("words", ("a",), ("a",)),
            ("words", [], ()),
        ],
    )
    def test_conversions(self, name, value, expected):
        made = getattr(build(Demo, {name: value}), name)
        assert made == expected
        assert type(made) is type(expected)

    @pytest.mark.parametrize(
        ("name", "value", "found"),
        [
            ("whole", 8.0, "found 8.0, a whole number is allowed"),
            ("whole", "8", "found '8', a whole number is allowed"),
            ("whole", True, "found True, a whole number is allowed"),
            ("whole", None, "found nothing, a value is needed"),
            ("maybe", [3], "found [3], a whole number is allowed"),
            ("real", "x", "found 'x', a number is allowed"),
            ("real", "", "found '', a number is allowed"),
            ("real", False, "found False, a number is allowed"),
            ("real", float("nan"), "found nan, a number is allowed"),
            ("real", "inf", "found 'inf', a number is allowed"),
            ("real", 10**400, f"found 1{17 * '0'}...{19 * '0'}, a number is allowed"),
            ("yes", 1, "found 1, true or false is allowed"),
            ("yes", "true", "found 'true', true or false is allowed"),
            ("perhaps", "no", "found 'no', true or false is allowed"),
            ("word", 3, "found 3, text is allowed"),
            ("text", {"a": 1}, "found {'a': 1}, text is allowed"),
            ("path", 3, "found 3, a path is allowed"),
            ("words", 5, "found 5, text is allowed"),
            ("words", ["a", None], "found None, text is allowed"),
            ("words", {"a": "b"}, "found {'a': 'b'}, text is allowed"),
            ("words", None, "found nothing, a value is needed"),
        ],
    )
    def test_wrong_type(self, name, value, found):
        assert message({name: value}) == f"--{name}: {found}"
        assert message({name: value}, source="c.yaml") == f"c.yaml: {name}: {found}"

    @pytest.mark.parametrize(
        ("name", "value", "found"),
        [
            ("whole", 0, "found 0, at least 1 is allowed"),
            ("whole", 10, "found 10, at most 9 is allowed"),
            ("maybe", -(10**40), "found -10000000000000000...0000000000000000000, at least 1"),
            ("maybe", 2**63, "found 9223372036854775808, at most 9223372036854775807 is allowed"),
            ("real", 0, "found 0, more than 0 is allowed"),
            ("real", 1.5, "found 1.5, at most 1 is allowed"),
            ("word", "c", "found 'c'\n hint: allowed: a, b"),
        ],
    )
    def test_limits(self, name, value, found):
        assert message({name: value}).startswith(f"--{name}: {found}")

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("wrod", "did you mean 'word'?"),
            ("whole_", "did you mean 'whole'?"),
            ("zzz", "allowed: whole, maybe, real, yes, perhaps, word, text, path, words"),
        ],
    )
    def test_unknown_name(self, name, hint):
        expected = f"c.yaml: {name}: unknown setting {name!r}\n hint: {hint}"
        assert message({name: 1}, source="c.yaml") == expected

    def test_all_problems_are_said_together(self):
        with pytest.raises(CollectedError) as error:
            build(Demo, {"whole": 0, "real": "x", "wrod": 1, "text": "fine", "words": 5})
        assert str(error.value).splitlines() == [
            "--whole: found 0, at least 1 is allowed",
            "--real: found 'x', a number is allowed",
            "--wrod: unknown setting 'wrod'",
            " hint: did you mean 'word'?",
            "--words: found 5, text is allowed",
        ]
        assert error.value.exit_code == 2

    def test_problems_between_settings_are_said_together(self):
        found = message({"yes": True, "word": "b", "maybe": 1})
        assert found == "--yes: not with b\n--yes: not with a number"

    def test_one_problem_is_said_alone(self):
        with pytest.raises(ConfigError, match=r"^--whole: found 0, at least 1 is allowed$"):
            build(Demo, {"whole": 0})

    def test_check_looks_at_what_python_was_given(self):
        with pytest.raises(ConfigError, match=r"^--whole: found 'x', a whole number is allowed$"):
            check(Demo(whole="x"))
        assert check(Demo(words=["a"])).words == ("a",)

    def test_check_says_what_has_no_effect(self, capsys):
        check(Demo(yes=True, text="x"))
        assert capsys.readouterr().err == "warning: --text has no effect: yes is given\n"
        check(Demo(text="x"))
        assert capsys.readouterr().err == ""

    def test_flags(self):
        assert flag("lora_rank") == "--lora-rank"


class TestConfigs:
    @each_config
    def test_defaults_are_allowed(self, cls):
        made = build(cls, CONFIGS[cls])
        assert check(made) == made

    @each_config
    def test_every_field_keeps_its_limits(self, cls):
        for spec in dataclasses.fields(cls):
            for key, step in (("minimum", -1), ("above", 0), ("maximum", 1)):
                limit = spec.metadata[key]
                if limit is None:
                    continue
                words = {"minimum": "at least", "above": "more than", "maximum": "at most"}[key]
                found = message({**CONFIGS[cls], spec.name: limit + step}, cls)
                assert found == (
                    f"{flag(spec.name)}: found {limit + step:g}, {words} {limit} is allowed"
                )
                if key != "above":
                    build(cls, {**CONFIGS[cls], **NEEDED.get(spec.name, {}), spec.name: limit})

    @each_config
    def test_every_field_keeps_its_choices(self, cls):
        for spec in dataclasses.fields(cls):
            choices = spec.metadata["choices"]
            for word in choices:
                assert getattr(build(cls, {**CONFIGS[cls], spec.name: word}), spec.name) == word
            if choices:
                found = message({**CONFIGS[cls], spec.name: "nonsense"}, cls)
                assert found == (
                    f"{flag(spec.name)}: found 'nonsense'\n hint: allowed: {', '.join(choices)}"
                )

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("val_ratio", 2), ("val_ratio", -0.1), ("lora_rank", 0), ("lora_dropout", 1),
            ("batch_size", 0), ("learning_rate", 0), ("warmup_ratio", 1.1), ("max_length", 7),
            ("num_train_epochs", 0), ("seed", -1), ("save_total_limit", 0), ("lora_alpha", 0),
        ],
    )  # fmt: skip
    def test_the_limits_of_training(self, name, value):
        found = message({"dataset": "a.jsonl", name: value}, SftConfig)
        assert found.startswith(f"{flag(name)}: found {value}, ")

    @each_config
    def test_every_setting_is_explained(self, cls):
        for spec in dataclasses.fields(cls):
            assert spec.metadata["panel"], spec.name
            assert spec.metadata["help"].endswith("."), spec.name

    def test_training_needs_data(self):
        assert message({}, SftConfig) == (
            "--dataset: no training data given\n"
            " hint: name a .jsonl, .json, .csv or .parquet file; one that works is "
            f"{sample_folder('handwriting') / 'train.jsonl'}"
        )
        assert (sample_folder("handwriting") / "train.jsonl").is_file()
        assert build(SftConfig, {"resume": "run"}).resume == Path("run")

    def test_what_a_full_run_cannot_have(self):
        values = {"dataset": "a", "tuner": "full", "quantize": "nf4", "use_dora": True}
        assert message(values, SftConfig) == (
            "--quantize: found nf4 with --tuner full; quantised weights cannot train\n"
            " hint: use --tuner lora, or --quantize none\n"
            "--use-dora: only with --tuner lora, found full\n"
            " hint: leave it out, or use --tuner lora"
        )

    @pytest.mark.parametrize("quantize", ["int8", "nf4"])
    @pytest.mark.parametrize(
        ("start", "reason"),
        [
            ("pissa", "it changes the base weights as well, and these cannot be changed in"),
            ("olora", "it changes the base weights as well, and these cannot be changed in"),
            ("orthogonal", "peft gives the LoRA weights the dtype of the base's, which is an "
             "integer in"),
        ],
    )  # fmt: skip
    def test_what_quantised_weights_cannot_have(self, start, reason, quantize):
        values = {"dataset": "a", "init_lora_weights": start, "quantize": quantize}
        assert message(values, SftConfig) == (
            f"--init-lora-weights: found {start}; {reason} {quantize}\n"
            " hint: use default or gaussian with --quantize"
        )

    def test_what_inference_needs(self):
        values = {"load_dataset_config": True, "dataset": ["a.jsonl"], "merge_lora": True}
        assert message(values, InferConfig) == (
            "--load-dataset-config: found together with --dataset; one of the two is allowed\n"
            " hint: leave one of them out\n"
            "--load-dataset-config: needs the run whose validation set it answers\n"
            " hint: add --ckpt-dir output/.../checkpoint-N\n"
            "--merge-lora: needs an adapter\n hint: add --ckpt-dir"
        )

    def test_merging_needs_an_adapter(self):
        assert message({}, MergeLoraConfig) == (
            "--ckpt-dir: no adapter given\n hint: name a run or a checkpoint-N folder of vlft sft"
        )


def other_value(cls: type, spec: dataclasses.Field[Any]) -> Any:
    """A value that is not the default, in the field's own type."""
    kind = field_type(cls, spec.name)
    default = None if spec.default is dataclasses.MISSING else spec.default
    if spec.metadata["choices"]:
        return next(word for word in spec.metadata["choices"] if word != default)
    if spec.default is dataclasses.MISSING:
        return tuple(map(kind, ("one.jsonl#3", "two.json")))
    values = {bool: not default, int: 11, float: 0.1 + 0.2, str: "é \u2028 x", Path: Path("a b/c")}
    return values[kind]


@each_config
class TestRoundTrip:
    @pytest.fixture
    def changed(self, cls):
        made = cls(**{spec.name: other_value(cls, spec) for spec in dataclasses.fields(cls)})
        # Only what cannot stand together is put back.
        if cls is SftConfig:
            of_the_run = {
                "adapter": None,
                "resume": None,
                "overwrite": False,
                "accept_changes": False,
            }
            return dataclasses.replace(
                made, tuner="lora", init_lora_weights="default", show_sample=True, **of_the_run
            )
        if cls is InferConfig:
            of_documents = {
                **{"image": (), "query": None, "save_text": None},
                **{"pdf_dpi": 200, "pages_per_prompt": 1},
            }
            return dataclasses.replace(
                made, load_dataset_config=False, system=None, merge_lora=False, num_beams=1,
                **of_documents,
            )  # fmt: skip
        return dataclasses.replace(made, max_shard_size="1.5 GB")

    def test_through_json(self, cls, changed):
        values = json.loads(json.dumps(to_json(changed)))
        again = build(cls, values)
        assert again == changed
        assert [type(value) for value in vars(again).values()] == [
            type(value) for value in vars(changed).values()
        ]

    def test_of_the_defaults(self, cls):
        made = build(cls, CONFIGS[cls])
        assert build(cls, json.loads(json.dumps(to_json(made)))) == made

    @pytest.mark.parametrize("ending", ["json", "yaml"])
    def test_through_a_file(self, cls, changed, tmp_path, ending):
        path = tmp_path / f"run.{ending}"
        # YAML reads JSON too.
        path.write_text(json.dumps(to_json(changed)), "utf-8")
        assert build(cls, read_config_file(path)) == changed


class TestFiles:
    @pytest.fixture(autouse=True)
    def _inside(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def read(self, content: str | bytes, name: str = "c.yaml") -> dict[str, Any]:
        data = content if isinstance(content, bytes) else content.encode()
        Path(name).write_bytes(data)
        return read_config_file(Path(name))

    def message(self, content: str | bytes, name: str = "c.yaml") -> str:
        with pytest.raises(ConfigError) as error:
            self.read(content, name)
        return str(error.value)

    def test_yaml(self):
        table = self.read(
            "learning_rate: 1e-4\ndataset:\n  - a.jsonl\n  - b.jsonl#3\nimage_root: pics\n"
            "max_length:\nuse_dora: on\n"
        )
        made = build(SftConfig, table)
        assert (made.learning_rate, made.dataset) == (1e-4, ("a.jsonl", "b.jsonl#3"))
        assert (made.image_root, made.max_length, made.use_dora) == (Path("pics"), None, True)

    def test_keys_as_flags(self):
        table = self.read('{"--lora-rank": 4, "lora-alpha": 8, "lora_dropout": 0}', "c.json")
        assert table == {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0}

    @pytest.mark.parametrize("name", ["c.json", "c.yaml"])
    def test_byte_order_mark(self, name):
        assert self.read(b'\xef\xbb\xbf{"seed": 1}', name) == {"seed": 1}

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ("- a\n- b\n", "found a list, a table of settings is allowed"),
            ("text", "found text, a table of settings is allowed"),
            ("", "found nothing, a table of settings is allowed"),
            ("3", "found a whole number, a table of settings is allowed"),
            ("a: [1\nb: 2\n", "not YAML: expected ',' or ']', but got ':' at line 2, column 2"),
            ("a: b: c", "not YAML: mapping values are not allowed here at line 1, column 5"),
            ("a: 2020-13-45", "not YAML: month must be in 1..12"),
            (5000 * "[", "not YAML: too deeply nested"),
            (
                "a: !!python/object:os.system {}",
                "not YAML: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/object:os.system' at line 1, column 4",
            ),
            (
                "a: \0",
                "not YAML: unacceptable character #x0000: special characters are not allowed",
            ),
        ],
    )  # fmt: skip
    def test_not_a_table_in_yaml(self, content, found):
        assert self.message(content) == (
            f'c.yaml: {found}\n hint: write e.g. a line "model: ..." and '
            'a line "dataset: train.jsonl"'
        )

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ("[1]", "found a list, a table of settings is allowed"),
            ("null", "found nothing, a table of settings is allowed"),
            ("", "not JSON: Expecting value at line 1, column 1"),
            ('{"a":\n', "not JSON: Expecting value at line 2, column 1"),
            ('{\n"a', "not JSON: Unterminated string starting at line 2, column 1"),
            (100_000 * "[", "not JSON: too deeply nested"),
        ],
    )
    def test_not_a_table_in_json(self, content, found):
        assert self.message(content, "c.json") == (
            f'c.json: {found}\n hint: write e.g. {{"model": "...", "dataset": ["train.jsonl"]}}'
        )

    @pytest.mark.parametrize("name", ["c.json", "c.yaml"])
    def test_numbers_without_end(self, name):
        assert "Exceeds the limit (4300 digits)" in self.message(f'{{"a": 1{5000 * "0"}}}', name)

    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "c.json")
        with pytest.raises(ConfigError, match=r"cannot be read \(not a regular file\)"):
            read_config_file(tmp_path / "c.json")

    @pytest.mark.parametrize("name", ["c.json", "c.yaml"])
    def test_binary(self, name):
        assert self.message(bytes(range(256)), name) == (
            f"{name}: not UTF-8 (byte 128)\n hint: name a JSON or YAML file"
        )

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no.yaml", "No such file or directory"),
            (".", "not a regular file"),
            ("\0", "embedded null"),
        ],
    )
    def test_cannot_be_read(self, name, reason):
        with pytest.raises(
            ConfigError, match=rf"cannot be read \({reason}.*\)\n hint: name a JSON"
        ):
            read_config_file(Path(name))


class TestCommandLine:
    """The real options of the real dataclasses; only the work is left out."""

    @pytest.fixture(autouse=True)
    def _inside(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def run(self, *arguments: str, cls: type = SftConfig) -> tuple[Any, set[str]]:
        return read_settings(cls, "sft", arguments)

    def test_flags(self):
        config, written = self.run(
            "--dataset", "a.jsonl", "--dataset", "b.jsonl#2", "--lora-rank", "4",
            "--no-show-sample", "--learning-rate", "1e-3", "--image-root", "pics", "--use-dora",
        )  # fmt: skip
        assert config == SftConfig(
            dataset=("a.jsonl", "b.jsonl#2"),
            lora_rank=4,
            show_sample=False,
            learning_rate=1e-3,
            image_root=Path("pics"),
            use_dora=True,
        )
        assert written == {
            "dataset", "lora_rank", "show_sample", "learning_rate", "image_root", "use_dora",
        }  # fmt: skip

    def test_flags_win_over_the_file(self):
        Path("c.yaml").write_text(
            "lora_rank: 4\nseed: 7\nuse_dora: true\ndataset: [x.jsonl, y.jsonl]\nshow_sample: no\n"
        )
        config, written = self.run(
            "--config", "c.yaml", "--lora-rank", "16", "--no-use-dora", "--dataset", "a.jsonl"
        )
        assert (config.lora_rank, config.use_dora, config.dataset) == (16, False, ("a.jsonl",))
        assert (config.seed, config.show_sample, config.lora_alpha) == (7, False, 32)
        assert written == {"lora_rank", "seed", "use_dora", "dataset", "show_sample"}

    def test_a_flag_may_be_a_default(self):
        Path("c.json").write_text('{"lora_rank": 4, "dataset": "a"}')
        config, written = self.run("--config", "c.json", "--lora-rank", "8")
        assert config.lora_rank == 8
        assert "lora_rank" in written

    def test_what_the_file_lacks_may_come_as_a_flag(self):
        Path("c.yaml").write_text("seed: 7\n")
        assert self.run("--config", "c.yaml", "--dataset", "a")[0].dataset == ("a",)
        with pytest.raises(ConfigError, match=r"^--dataset: no training data given"):
            self.run("--config", "c.yaml")

    def test_what_is_wrong_in_the_file_is_said_with_its_name_even_under_a_flag(self):
        Path("c.yaml").write_text("lora_rank: 0\nlora_alhpa: 3\n")
        with pytest.raises(CollectedError) as error:
            self.run("--config", "c.yaml", "--dataset", "a", "--lora-rank", "4")
        assert str(error.value) == (
            "c.yaml: lora_rank: found 0, at least 1 is allowed\n"
            "c.yaml: lora_alhpa: unknown setting 'lora_alhpa'\n hint: did you mean 'lora_alpha'?"
        )

    def test_what_is_wrong_between_file_and_flags(self):
        Path("c.yaml").write_text("tuner: full\n")
        with pytest.raises(ConfigError, match=r"^--quantize: found nf4 with --tuner full"):
            self.run("--config", "c.yaml", "--dataset", "a", "--quantize", "nf4")

    def test_several_wrong_flags_are_said_together(self):
        with pytest.raises(CollectedError) as error:
            self.run("--lora-rank", "0", "--val-ratio", "2", "--seed", "-1", "--dataset", "a")
        assert str(error.value).splitlines() == [
            "--lora-rank: found 0, at least 1 is allowed",
            "--val-ratio: found 2, at most 0.9 is allowed",
            "--seed: found -1, at least 0 is allowed",
        ]


class TestTheLastResort:
    """What no command foresaw is still text and an exit code."""

    def main(self, monkeypatch, capsys, error: Exception, *flags: str) -> tuple[int, str]:
        from vlft.cli import app

        def fail() -> None:
            raise error

        monkeypatch.setattr(app, "app", fail)
        monkeypatch.setattr(sys, "argv", ["vlft", "sft", *flags])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        return exit_.value.code, capsys.readouterr().err

    def test_a_path_that_cannot_be_used(self, monkeypatch, capsys, tmp_path):
        monkeypatch.chdir(tmp_path)
        error = NotADirectoryError(20, "Not a directory", str(tmp_path / "a.jsonl" / "model"))
        assert self.main(monkeypatch, capsys, error) == (
            2,
            "error: a.jsonl/model: cannot be used (Not a directory)\n"
            " hint: name another path; --debug shows what it is needed for\n",
        )

    def test_a_full_disk(self, monkeypatch, capsys):
        error = OSError(28, "No space left on device")
        assert self.main(monkeypatch, capsys, error) == (
            1,
            "error: No space left on device\n hint: make room, then run the command again\n",
        )

    def test_ctrl_c_in_a_command(self, monkeypatch, capsys):
        from vlft.cli import app

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("vlft.cli.models.list_models", stop)
        monkeypatch.setattr(sys, "argv", ["vlft", "models"])
        with pytest.raises(SystemExit) as exit_:
            app.main()
        assert exit_.value.code == 130
        assert capsys.readouterr().err == "error: stopped; what was saved before is whole\n"

    def test_debug_shows_the_traceback(self, monkeypatch, capsys):
        code, text = self.main(monkeypatch, capsys, ConfigError("wrong", place="--x"), "--debug")
        assert code == 2
        assert "Traceback" in text
        assert text.endswith("error: --x: wrong\n")


class TestAuto:
    """A number for which the word ``auto`` may stand."""

    @pytest.mark.parametrize(("given", "found"), [("auto", None), ("12", 12), (12, 12)])
    def test_words_and_numbers(self, given, found):
        config = build(SftConfig, {"dataset": ["a"], "tokens_per_microbatch": given})
        assert config.tokens_per_microbatch == found

    @pytest.mark.parametrize("given", ["many", "-3", "1.5", ""])
    def test_other_words(self, given):
        with pytest.raises(UsageError, match=f"found '{given}', a whole number or auto"):
            build(SftConfig, {"dataset": ["a"], "tokens_per_microbatch": given})


class TestGpus:
    @pytest.mark.parametrize(
        ("gpu", "gib"),
        [
            ("4090", 24), ("rtx4090", 24), ("RTX 4090", 24), ("rtx-4090", 24), ("rtx_4090", 24),
            ("NVIDIA GeForce RTX 4090", 24), ("h100", 80), ("NVIDIA H100 PCIe", 80),
            ("NVIDIA A100", 80), ("A100 80GB", 80), ("a100-40gb", 40), ("A100 40 GiB", 40),
            ("NVIDIA A100-SXM4-40GB", 40), ("Tesla T4", 15), ("V100-16GB", 16), ("RTX A6000", 48),
            ("24GB", 24), ("80 gib", 80), ("16", 16), (" 22.5 GB", 22.5), ("288GB", 288),
        ],
    )  # fmt: skip
    def test_names_and_sizes(self, gpu, gib):
        assert gpu_gib(gpu) == gib

    @pytest.mark.parametrize(
        "gpu", ["", "fast", "4091", "257", "0", "0GB", "-3", "-3GB", "x100 80GB", "4091 24GB", "GB"]
    )
    def test_others_are_refused_with_the_names(self, gpu):
        with pytest.raises(ConfigError) as error:
            gpu_gib(gpu)
        assert str(error.value).startswith(
            f"--gpu: found {gpu!r}\n hint: a size like 24GB, or t4, l4, "
        )

    def test_every_name(self):
        assert all(gpu_gib(name) == gib for name, gib in GPUS.items())


class TestDefaultsAreWrittenOnce:
    """Python's functions and the parts of a run take the defaults of the command line."""

    @pytest.mark.parametrize("function", [vlft.load, vlft.generate, Sampling])
    def test_of_inference(self, function):
        for name, parameter in inspect.signature(function).parameters.items():
            default = getattr(InferConfig, name, None)
            if default is not None:
                assert parameter.default == default, name
        assert inspect.signature(vlft.load).parameters["quantize"].default == SftConfig.quantize

    def test_of_lora(self):
        for spec in dataclasses.fields(LoraOptions):
            names = (spec.name, f"lora_{spec.name}", f"{spec.name}_lora_weights")
            (name,) = [name for name in names if hasattr(SftConfig, name)]
            assert spec.default == getattr(SftConfig, name)


class TestHome:
    """``~`` is the home folder in every setting that may be a path."""

    @pytest.fixture(autouse=True)
    def _home(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")

    @pytest.mark.parametrize("cls", [SftConfig, PlanConfig, InferConfig, MergeLoraConfig])
    def test_every_path(self, cls):
        names = {"model", "dataset", "val_dataset"} | {
            spec.name for spec in dataclasses.fields(cls) if field_type(cls, spec.name) is Path
        }
        names &= {spec.name for spec in dataclasses.fields(cls)}
        assert len(names) > 2
        for name in names:
            if name == "dataset" or name == "val_dataset":
                made = build(cls, {"dataset": ["a"], name: ["~/a.jsonl#5", "b"]})
                assert getattr(made, name) == ("/home/me/a.jsonl#5", "b")
                continue
            needed = CONFIGS.get(cls, {})
            if cls is PlanConfig and name in ("adapter", "resume"):
                continue
            for value in ("~/a", Path("~/a")):
                made = build(cls, {**needed, **NEEDED.get(name, {}), name: value})
                found = getattr(made, name)
                paths = found if isinstance(found, tuple) else (found,)
                assert [str(path) for path in paths] == ["/home/me/a"], name
                assert check(made) == made

    def test_of_convert(self):
        made = build(ConvertConfig, {"src": "~/a", "dst": "~"})
        assert (made.src, made.dst) == ("/home/me/a", Path("/home/me"))

    def test_of_the_file_itself(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "c.yaml").write_text("dataset: ~/a.jsonl\noutput_dir: ~/out\n")
        made, _ = read_settings(SftConfig, "sft", ["--config", "~/c.yaml"])
        assert made.dataset == (f"{tmp_path}/a.jsonl",)
        assert made.output_dir == tmp_path / "out"

    @pytest.mark.parametrize("value", ["a~", "./~", "~nobody-of-this-name/x", "deepseek-ai/~x"])
    def test_what_is_left_alone(self, value):
        assert build(SftConfig, {"dataset": ["a"], "model": value}).model == value
        assert build(SftConfig, {"dataset": ["a"], "output_dir": value}).output_dir == Path(value)

    def test_a_text_is_not_a_path(self):
        assert build(InferConfig, {"system": "~/a"}).system == "~/a"


def test_all_checkpoints_may_be_kept():
    made = check(SftConfig(dataset=("a",), save_total_limit=None))
    assert made.save_total_limit is None
    assert build(SftConfig, to_json(made)) == made
    assert message({"dataset": "a", "save_steps": None, "seed": None}, SftConfig) == (
        "--seed: found nothing, a value is needed"
    )


class TestShardSizes:
    @pytest.mark.parametrize("size", ["1KB", "1.5 GB", "500mb", "0.001MB", "2TB", " 5GB "])
    def test_allowed(self, size):
        assert build(MergeLoraConfig, {"ckpt_dir": "c", "max_shard_size": size})
        assert parse_size_to_int(size) >= 1000

    @pytest.mark.parametrize(
        "size",
        [
            "1001TB",
            "9" * 400 + "GB",
            "100B",
            "0GB",
            "0.5KB",
            "0.0001MB",
            "5",
            "GB",
            "5GiB",
            "-1GB",
            "1e3MB",
            "5 G",
            "",
        ],
    )
    @pytest.mark.parametrize(
        ("cls", "needed"),
        [(MergeLoraConfig, {"ckpt_dir": "c"}), (ConvertConfig, {"src": "a", "dst": "b"})],
    )
    def test_refused(self, cls, needed, size):
        assert message({**needed, "max_shard_size": size}, cls) == (
            f"--max-shard-size: found {size!r}, 1KB to 1000TB is allowed\n"
            " hint: write e.g. 5GB or 500MB; the units are KB, MB, GB and TB"
        )
