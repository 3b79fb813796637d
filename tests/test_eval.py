"""vlft eval: metrics against their references, intervals and tests against scipy, the command."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SIGLIP, write_jsonl

import vlft
from vlft.cli import app
from vlft.config import METRIC_NAMES
from vlft.errors import CheckpointError, ConfigError, DataError, UsageError
from vlft.evaluation.boxes import box_accuracy, box_iou, box_parsed
from vlft.evaluation.edits import anls, cer, edit_distance, wer
from vlft.evaluation.json_fields import json_fields
from vlft.evaluation.metrics import METRICS
from vlft.evaluation.numbers import relaxed_accuracy
from vlft.evaluation.statistics import interval, paired_p_value, resample_sums
from vlft.evaluation.text import contains, exact_match, token_f1

# Numbers drawn once; what scipy 1.17.1 says of them stands with each test.
X = [0.64, 0.27, 0.04, 0.02, 0.81, 0.91, 0.61, 0.73, 0.54, 0.94, 0.82, 0.0, 0.86, 0.03, 0.73,
     0.18, 0.86, 0.54, 0.3, 0.42, 0.03, 0.12, 0.67, 0.65, 0.62, 0.38, 1.0, 0.98, 0.69, 0.65, 0.69,
     0.39, 0.14, 0.72, 0.53, 0.31, 0.49, 0.89, 0.93, 0.36]  # fmt: skip
Y = [0.44, 0.62, 0.36, 0.23, 0.91, 0.9, 0.95, 1.0, 0.95, 1.0, 0.94, 0.0, 0.91, 0.21, 0.52, 0.31,
     1.0, 0.73, 0.11, 0.34, 0.0, 0.0, 1.0, 0.6, 0.74, 0.38, 1.0, 1.0, 0.87, 0.26, 0.75, 0.58, 0.39,
     0.65, 0.94, 0.1, 0.41, 1.0, 0.99, 0.81]  # fmt: skip
CAT = "<|ref|>the cat<|/ref|><|det|>[[100, 100, 200, 200]]<|/det|>"
# Reply, reference; jiwer 4.0.0: cer(reference, reply), wer; rouge-score 0.1.2: rougeL F1;
# sacrebleu 2.6.0: sentence_bleu(reply, [reference]).score / 100.
FIXED = [
    ("the cat sat", "the cat sat on the mat", 0.5, 0.5, 2 / 3, 0.3678794411714425),
    ("kitten", "sitting", 0.42857142857142855, 1.0, 0.0, 0.0),
    ("", "abc d", 1.0, 1.0, 0.0, 0.0),
    ("a b c d e", "a x c", 1.0, 1.0, 0.5, 0.12703318703865365),
    ("  Überweisung 12,50 €", "Überweisung 12.50 € ", 0.05263157894736842, 1 / 3, 1.0,
     0.3466806371753173),
    ("完全に違う", "完全に同じ", 0.4, 1.0, 0.0, 0.0),
    ("The quick brown fox jumps over the lazy dog.",
     "The quick brown dog jumps over the lazy fox.", 1 / 11, 2 / 9, 7 / 9, 0.4153509237206397),
]  # fmt: skip


LIBRARIES = {"rouge-l": "rouge_score", "sentence-bleu": "sacrebleu"}


def needs(name):
    """Skips the test if the library of a metric is not installed."""
    pytest.importorskip(LIBRARIES[name], reason=f"{name} needs vlft[eval]")


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def result(reply, label, number=0, **fields):
    """A line as vlft infer writes it."""
    row = {"query": f"<image>{number}?", "response": reply, "finish": "stop", "label": label}
    return {**row, "images": [f"/{number}.png"], "image_keys": [f"{number:016}"], **fields}


def evaluate(*rows, metric=("exact-match",), **settings):
    """The summary of result files with these lines."""
    files = [f"{index}.jsonl" for index in range(len(rows))]
    for name, lines in zip(files, rows, strict=True):
        write_jsonl(Path(name), lines)
    return vlft.evaluate(vlft.EvalConfig(results=tuple(files), metric=metric, **settings))


class TestMetrics:
    def test_the_names_of_the_flag_are_those_of_the_table(self):
        assert tuple(METRICS) == METRIC_NAMES

    def test_the_table_of_the_docs_has_each(self):
        text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text("utf-8")
        assert tuple(re.findall(r"^\| `([\w-]+)` \|", text, re.M)) == METRIC_NAMES

    @pytest.mark.parametrize("name", [name for name in METRICS if not METRICS[name].of_fields])
    def test_an_empty_reply_is_wrong(self, name):
        special = {"json-fields": '{"a": 1}', "teds": "| a |\n|---|"}
        label = special.get(name, CAT if name.startswith("box") else "the")
        if name in LIBRARIES:
            needs(name)
        wrong = 0.0 if METRICS[name].higher_is_better else 1.0
        score = METRICS[name].scorer([[label], ["Another."]])
        assert score("", [label])[0] == wrong
        assert score(" \n", [label])[0] == wrong

    def test_a_file_of_the_user(self):
        Path("own.py").write_text(
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n\n\n"
            "@dataclass\n"
            "class Letters:\n"
            "    text: str\n\n\n"
            "HIGHER_IS_BETTER = False\n\n\n"
            "def score(reply, reference):\n"
            "    return abs(len(Letters(reply).text) - len(reference))\n"
        )
        found = evaluate([result("abc", "a"), result("a", "a")], metric=("own.py", "contains"))
        assert list(found.summary["metrics"]) == ["own", "contains"]
        assert found.summary["metrics"]["own"]["scores"][0]["mean"] == 1.0
        assert not found.summary["metrics"]["own"]["higher_is_better"]
        assert json.loads(Path("0.scores.jsonl").read_text().splitlines()[0])["own"] == 2.0

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (None, "own.py: no such file"),
            ("def score(reply:", "own.py: SyntaxError"),
            ("1 / 0", "own.py: ZeroDivisionError: division by zero"),
            ("x = 1", "own.py: has no function score"),
            ("def score(reply, reference):\n    raise KeyError(reply)", "own.py: KeyError: 'abc'"),
            ("def score(reply, reference):\n    return float('nan')", "own.py: score returned nan"),
        ],
    )
    def test_mistakes_in_a_file_of_the_user(self, text, expected):
        if text is not None:
            Path("own.py").write_text(text)
        with pytest.raises(ConfigError, match=re.escape(expected)):
            evaluate([result("abc", "a")], metric=("own.py",))

    def test_two_metrics_of_one_name(self):
        Path("cer.py").write_text("def score(reply, reference):\n    return 1")
        with pytest.raises(ConfigError, match="two metrics are called cer"):
            evaluate([result("abc", "a")], metric=("cer", "cer.py"))

    @pytest.mark.parametrize("case", FIXED)
    def test_error_rates_are_those_of_jiwer(self, case):
        reply, reference, in_characters, in_words, *_ = case
        assert cer(reply, reference) == pytest.approx(in_characters, abs=1e-12)
        assert wer(reply, reference) == pytest.approx(in_words, abs=1e-12)

    def test_edits_are_counted_as_by_the_table_of_all_prefixes(self):
        generator = random.Random(0)
        for _ in range(200):
            one, other = ("".join(generator.choices("abc", k=generator.randrange(9))) for _ in "12")
            row = list(range(len(other) + 1))
            for i, a in enumerate(one, 1):
                before, row = row, [i]
                for j, b in enumerate(other, 1):
                    row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
            assert edit_distance(one, other) == row[-1]

    def test_one_with_two_pages_of_text_is_quick_and_right(self):
        page = "".join(random.Random(1).choices("abcdefgh ", k=5000))
        assert edit_distance(page, page[:2000] + "X" + page[2001:4000]) == 1001

    @pytest.mark.parametrize(
        ("metric", "reply", "reference", "score"),
        [
            (exact_match, " 7\n", "7", 1),
            (exact_match, "seven", "Seven", 0),
            (contains, "It says  TOTAL\n12.", "total 12", 1),
            (contains, "12", "total 12", 0),
            # SQuAD's evaluate-v2.0.py, compute_f1(a_gold, a_pred).
            (token_f1, "The cat, sat!", "a cat sat down", 0.8),
            (token_f1, "cat cat", "cat", 2 / 3),
            (token_f1, "An", "the", 1),
            (token_f1, "dog", "the", 0),
            # By hand, from equation 1 of Biten et al. 2019; a similarity below 0.5 counts as 0.
            (anls, "Color", "colour", 5 / 6),
            (anls, "ab", "abcd", 0.5),
            (anls, "a", "abcd", 0),
            # pix2struct's relaxed_correctness(target, prediction).
            (relaxed_accuracy, "10.5", "10", 1),
            (relaxed_accuracy, "10.51", "10", 0),
            (relaxed_accuracy, "5%", "0.05", 1),
            (relaxed_accuracy, "-9.6", "-10", 1),
            (relaxed_accuracy, "0.0", "0", 0),
            (relaxed_accuracy, "Yes", "yes", 1),
            (relaxed_accuracy, "nan", "3", 0),
            (relaxed_accuracy, "1,000", "1000", 0),
            # Donut's JSONParseEvaluator.cal_f1([prediction], [answer]).
            (json_fields, '{"a": "1", "b": [{"c": 2}, {"c": 3}]}',
             '{"b": [{"c": 3}, {"c": 2}], "a": 1}', 1),
            (json_fields, '{"a": 1, "b": 2}', '{"a": 1, "b": 3, "c": 4}', 0.4),
            (json_fields, '```json\n{"a": 1}\n```', '{"a": 1.0, "b": null, "c": ""}', 1),
            (json_fields, '{"a": 1', '{"a": 1}', 0),
            (json_fields, "[" * 100_000, '{"a": 1}', 0),
            (json_fields, "{}", "{}", 1),
        ],
    )  # fmt: skip
    def test_fixed_cases(self, metric, reply, reference, score):
        assert metric(reply, reference) == pytest.approx(score, abs=1e-12)

    @pytest.mark.parametrize(
        ("reply", "iou", "accuracy", "parsed"),
        [
            (CAT, 1, 1, 1),
            ("<|det|>[[100, 100, 200, 150]]<|/det|>", 0.5, 1, 1),
            ("<|det|>the cat [100, 100, 200, 200]<|/det|>", 1, 1, 1),
            ("<|det|>[[150, 150, 250, 250]]<|/det|>", 2500 / 17500, 0, 1),
            # A second box that nobody asked for.
            ("<|det|>[[100, 100, 200, 200], [0, 0, 9, 9]]<|/det|>", 0.5, 0.5, 1),
            ("<|det|>[[200, 200, 100, 100]]<|/det|>", 0, 0, 0),
            ("<|det|>[[100, 100, 200, 1200]]<|/det|>", 1 / 11, 0, 0),
            ("<|det|>[[100, 100, 200, 200]]", 0, 0, 0),
            ("<|det|>[[100, 100, 200]]<|/det|>", 0, 0, 0),
            ("on the sofa", 0, 0, 0),
        ],
    )
    def test_boxes(self, reply, iou, accuracy, parsed):
        assert box_iou(reply, CAT) == pytest.approx(iou)
        assert (box_accuracy(reply, CAT), box_parsed(reply, CAT)) == (accuracy, parsed)

    def test_names_of_boxes_count_where_there_are_several(self):
        dog = CAT.replace("cat", "dog").replace("100", "0")
        assert box_iou(dog + CAT, CAT + dog) == 1
        swapped = (CAT + dog).replace("cat", "x").replace("dog", "the cat").replace("x", "dog")
        assert box_iou(swapped, CAT + dog) < 0.5
        assert box_iou("<|det|>the cat [100, 100, 200, 200]<|/det|>", CAT + dog) == 0.5

    @pytest.mark.parametrize("case", FIXED)
    @pytest.mark.parametrize(("name", "column"), [("rouge-l", 4), ("sentence-bleu", 5)])
    def test_libraries(self, name, column, case):
        needs(name)
        assert METRICS[name].score(case[0], case[1]) == pytest.approx(case[column])

    def test_a_library_that_is_missing_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sacrebleu", None)
        with pytest.raises(ConfigError, match="sentence-bleu needs sacrebleu") as error:
            # Before the model, which is not there, is looked for.
            vlft.evaluate(
                vlft.EvalConfig(model="none", dataset=("q.jsonl",), metric=("sentence-bleu",))
            )
        assert error.value.hint == "pip install 'vlft[eval]'"


class TestStatistics:
    def test_intervals_are_those_of_scipy(self):
        """stats.bootstrap((data,), np.mean, n_resamples=99999, method="percentile", rng=1)."""
        sums = resample_sums(np.array([X, Y]).T, seed=0) / len(X)
        assert interval(sums[:, 0]) == pytest.approx((0.4425, 0.6285), abs=0.006)
        assert interval(sums[:, 1]) == pytest.approx((0.5165, 0.72525), abs=0.006)
        # Of np.array(Y) - X: pairs are drawn together.
        change = interval(sums[:, 1] - sums[:, 0])
        assert change == pytest.approx((0.02575, 0.1445), abs=0.004)

    def test_the_interval_of_a_ratio(self):
        """The same with (x * w, w), lambda p, q, axis: p.sum(axis) / q.sum(axis), paired=True."""
        weights = np.arange(1.0, 41)
        sums = resample_sums(np.array([X * weights, weights]).T, seed=0)
        ratio = interval(sums[:, 0] / sums[:, 1])
        assert ratio == pytest.approx((0.46058, 0.65177), abs=0.006)

    def test_draws_depend_on_the_seed_alone(self, monkeypatch):
        table = np.array([X]).T
        first = resample_sums(table, seed=3)
        monkeypatch.setattr("vlft.evaluation.statistics.CHUNK", 4000)
        assert np.allclose(resample_sums(table, seed=3), first)
        assert not np.allclose(resample_sums(table, seed=4), first)

    def test_exact_p_value(self):
        """stats.permutation_test((a, b), f, permutation_type="samples", n_resamples=np.inf)."""
        a = np.array([0.1, 0.5, 0.3, 0.9, 0, 0.4, 0.25, 0.6])
        b = np.array([0.4, 0.5, 0.8, 1, 0.3, 0.35, 0.75, 0.5])
        assert paired_p_value(b - a, seed=0) == pytest.approx(0.09375)

    def test_random_p_value(self):
        """The same with n_resamples=99999, rng=1: 0.00838."""
        assert paired_p_value(np.array(Y) - X, seed=0) == pytest.approx(0.00838, abs=0.003)

    def test_the_smallest_random_p_value_is_not_0(self):
        assert paired_p_value(np.linspace(0.1, 1, 40), seed=0) == 1 / 10_000

    @pytest.mark.parametrize(
        ("better", "worse", "p"),
        [(9, 3, 0.14599609375), (89, 1, 1.4701842918422953e-25), (5, 5, 1.0), (0, 0, 1.0)],
    )
    def test_p_value_of_right_and_wrong(self, better, worse, p):
        """stats.binomtest(better, better + worse).pvalue, McNemar's exact test."""
        differences = np.array([1.0] * better + [-1.0] * worse + [0.0] * 7)
        assert paired_p_value(differences, seed=0) == pytest.approx(p)


class TestFiles:
    def test_one_file(self, capsys):
        rows = [result("a", "a", 0), result("", "b", 1), result("c", "", 2), result("d", "d", 3)]
        found = evaluate(rows, metric=("exact-match", "cer"))
        metrics = found.summary["metrics"]
        # An empty reply is wrong; a line without a label is left out.
        assert metrics["exact-match"]["scores"][0]["mean"] == pytest.approx(2 / 3)
        assert found.summary["results"] == [
            {"path": "0.jsonl", "scores": "0.scores.jsonl", "records": 3, "unlabelled": 1,
             "unpaired": 0}
        ]  # fmt: skip
        text = capsys.readouterr().out
        assert "\n  left out: 1 line without a reference\n" in text
        assert "lower is better: cer" in text
        lines = [json.loads(line) for line in found.scores[0].read_text().splitlines()]
        assert lines[1] == {
            "result_line": 2, "query": "<image>1?", "reply": "", "references": ["b"],
            "exact_match": 0.0, "cer": 1.0, "cer_weight": 1.0,
        }  # fmt: skip
        assert [line["result_line"] for line in lines] == [1, 2, 4]

    def test_scores_load_as_a_table(self):
        pyarrow = pytest.importorskip("pyarrow.json", reason="needs pyarrow")
        rows = [result("a", "a", 0, id=7), result("b", "b", 1)]
        table = pyarrow.read_json(evaluate(rows, metric=("wer", "contains")).scores[0])
        assert table["contains"].to_pylist() == [1.0, 1.0]
        assert table["id"].to_pylist() == ["7", ""]

    def test_error_rates_are_of_all_characters(self):
        found = evaluate([result("x", "y"), result("abcdefghi", "abcdefghi", 1)], metric=("cer",))
        assert found.summary["metrics"]["cer"]["scores"][0]["mean"] == pytest.approx(0.1)

    def test_the_best_of_several_references_counts(self):
        rows = [
            result("b", "", 0, meta={"answers": ["a", "b"]}),
            result("4", "", 1, meta='{"answers": [4, 5]}'),
        ]
        found = evaluate(rows, metric=("exact-match", "cer"), references="meta.answers")
        metrics = found.summary["metrics"]
        assert metrics["exact-match"]["scores"][0]["mean"] == 1
        assert metrics["cer"]["scores"][0]["mean"] == 0

    def test_two_files(self, capsys):
        base = [result("wrong", str(n), n) for n in range(30)]
        # In another order, from other folders.
        tuned = [result(str(n), str(n), n, images=["/x"], file="b") for n in range(33, 2, -1)]
        found = evaluate(base, tuned).summary
        assert found["records"] == 27
        assert [one["unpaired"] for one in found["results"]] == [3, 4]
        metric = found["metrics"]["exact-match"]
        assert [one["mean"] for one in metric["scores"]] == [0, 1]
        assert metric["difference"]["mean"] == 1
        assert metric["difference"]["p"] == pytest.approx(2 / 2**27)
        text = capsys.readouterr().out
        assert "\n  left out: 3 lines of records that the other file lacks\n" in text
        assert max(map(len, text.splitlines())) <= 80
        row = "exact-match           0.0    100.0      +100.0  +100.0 to +100.0      1e-08"
        assert row in text.splitlines()

    def test_long_references_weigh_more_in_the_test_of_an_error_rate(self):
        labels = ["abcdefghi", "a", "b", "c"]
        base, tuned = (
            [result(label if right else "", label, n) for n, (label, right) in enumerate(pairs)]
            for pairs in (
                zip(labels, [0, 0, 0, 1], strict=True),
                zip(labels, [1, 1, 1, 0], strict=True),
            )
        )
        difference = evaluate(base, tuned, metric=("cer",)).summary["metrics"]["cer"]["difference"]
        assert difference["mean"] == pytest.approx(-10 / 12)
        # Of the sums +-9 +-1 +-1 +-1, 8 of 16 are 10 or more in size.
        assert difference["p"] == 0.5

    def test_equal_records_are_paired_in_order(self):
        base = [result("a", "a"), result("b", "a")]
        found = evaluate(base, base[::-1]).summary
        assert found["records"] == 2
        assert found["metrics"]["exact-match"]["difference"]["mean"] == 0

    def test_the_widest_table_has_80_columns(self, capsys):
        rows = [[result("1000 %" * 50, "1", n) for n in range(3)] for _ in "12"]
        evaluate(*rows, metric=("relaxed-accuracy", "cer"))
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "0.jsonl: has no lines"),
            ('{"response": "a", "label": ""}\n', "no line has a text in 'label'"),
            ('{"response": "a", "label": "a"}\n{"respo', "0.jsonl:2: no whole line of JSON"),
            ('{"label": "a"}\n', "0.jsonl:1: no text in 'response'"),
            ('{"response": "a", "label": [true]}\n', r"found \[true\] in 'label'"),
        ],
    )
    def test_what_is_no_result_file(self, text, message):
        Path("0.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            vlft.evaluate(vlft.EvalConfig(results=("0.jsonl",)))
        assert not Path("0.scores.jsonl").exists()

    def test_a_folder_is_no_result_file(self, tmp_path):
        with pytest.raises(DataError, match="not a regular file"):
            vlft.evaluate(vlft.EvalConfig(results=(tmp_path,)))

    def test_references_that_a_metric_cannot_use(self):
        with pytest.raises(DataError, match=r"0.jsonl:1: the reference is no JSON"):
            evaluate([result("{}", "seven")], metric=("json-fields",))
        with pytest.raises(DataError, match=r"0.jsonl:1: the reference has no box"):
            evaluate([result("{}", "seven")], metric=("box-iou",))

    def test_nothing_in_common(self):
        with pytest.raises(DataError, match=r"no record in common with 0.jsonl"):
            evaluate([result("a", "a", 1)], [result("a", "a", 2)])

    def test_a_file_of_others_is_kept(self):
        Path("0.scores.jsonl").write_text("mine")
        with pytest.raises(CheckpointError, match="vlft has not written this"):
            evaluate([result("a", "a")])
        assert Path("0.scores.jsonl").read_text() == "mine"

    def test_scores_are_replaced(self):
        evaluate([result("a", "a")], metric=("cer",))
        found = evaluate([result("a", "a")])
        assert "cer" not in found.scores[0].read_text()


class TestCommand:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "vlft eval: nothing to score"),
            ({"results": ("a", "b", "c")}, "found 3 sets of answers"),
            ({"results": ("a", "b"), "dataset": ("c",)}, "found 3 sets of answers"),
            ({"results": ("a",), "top_k": 3}, "--top-k: only for answers to a data set"),
            ({"image": ("a.png",), "query": "?"}, "--image: found documents"),
            ({"results": ("a",), "metric": ("bleu",)}, "--metric: found 'bleu'"),
            ({"dataset": ("a",), "top_k": 3}, "--temperature: top-p and top-k"),
        ],
    )
    def test_settings_that_do_not_fit(self, settings, message):
        with pytest.raises(UsageError) as error:
            vlft.evaluate(vlft.EvalConfig(**settings))
        assert message in str(error.value)

    def test_json_is_all_of_stdout(self, monkeypatch, capfd):
        write_jsonl(Path("0.jsonl"), [result("a", "a")])
        command = ["vlft", "eval", "--results", "0.jsonl", "--metric", "contains", "wer", "--json"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert stop.value.code == 0
        assert list(json.loads(capfd.readouterr().out)["metrics"]) == ["contains", "wer"]

    def test_a_model_against_the_answers_of_another(self, capfd):
        rows = [{"query": f"Say {word}.", "response": word} for word in ("one", "two")]
        data = write_jsonl(Path("q.jsonl"), rows)
        answering = {"model": str(SIGLIP.folder), "device": "cpu", "max_new_tokens": 2}
        base = vlft.infer(
            vlft.InferConfig(dataset=(str(data),), output=Path("b.jsonl"), **answering)
        )
        capfd.readouterr()
        config = vlft.EvalConfig(
            results=(base.output,), dataset=(str(data),), output=Path("t.jsonl"), metric=("cer",),
            json=True, **answering
        )  # fmt: skip
        found = vlft.evaluate(config)
        # The same model twice.
        assert found.summary["records"] == 2
        assert found.summary["metrics"]["cer"]["difference"] == {
            "mean": 0, "interval": (0, 0), "p": 1,
        }  # fmt: skip
        assert json.loads(capfd.readouterr().out)["records"] == 2
        with pytest.raises(ConfigError, match=r"t.jsonl twice"):
            vlft.evaluate(vlft.EvalConfig(results=("t.jsonl", "t.jsonl")))
