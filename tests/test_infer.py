"""Answers to data sets, the chat, the Python API."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import json
import logging
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict

import pytest
import torch
from conftest import GOLDEN, ONE_EACH, SIGLIP, make_rows, write_jsonl
from PIL import Image

import vlft
from vlft import console
from vlft.checkpoints.runs import find_checkpoint
from vlft.console import out
from vlft.data.encode import EncodedSample
from vlft.errors import CheckpointError, ConfigError, DataError, UsageError, VlftError
from vlft.inference import chat as infer_chat
from vlft.inference import features
from vlft.inference.chat import chat
from vlft.inference.decoding import Draw
from vlft.inference.generate import Sampling, generate_replies
from vlft.inference.replier import Replier, Reply

TALKING = [case for case in ONE_EACH if not case.image_mode]
CASE = SIGLIP


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run that leaves an adapter which does something."""
    home = tmp_path_factory.mktemp("infer")
    result = vlft.sft(
        vlft.SftConfig(
            model=str(CASE.folder),
            dataset=(str(write_jsonl(home / "train.jsonl", make_rows(24))),),
            image_root=GOLDEN / "images",
            val_ratio=0.25,
            output_dir=home / "output",
            num_train_epochs=3,
            batch_size=4,
            learning_rate=1e-2,
            show_sample=False,
            device="cpu",
        )
    )
    return result.run


def answer(run, **settings):
    given = {"max_new_tokens": 8, "show_samples": 0, "device": "cpu", **settings}
    return vlft.infer(vlft.InferConfig(ckpt_dir=run, **given))


def load(**settings):
    """The base model on the CPU; ``auto`` would choose a GPU where there is one, and bfloat16."""
    return vlft.load(CASE.folder, device="cpu", **settings)


class TestDatasets:
    def test_the_validation_set_of_the_run(self, run):
        result = answer(run, load_dataset_config=True, overwrite=True)
        assert result.output == run / "infer" / f"{find_checkpoint(run).name}-val.jsonl"
        rows = result.rows
        split = json.loads((run / "split.json").read_text())["validation"]
        given = [make_rows(24)[record] for _, record in split]
        assert [row["query"] for row in rows] == [row["query"] for row in given]
        # A quarter of the records, or somewhat more: those on one image stay together.
        assert 6 <= len(rows) <= 9
        queries = {(row["query"], row["response"]) for row in make_rows(24)}
        assert {(row["query"], row["label"]) for row in rows} <= queries
        for row in rows:
            assert list(row)[:6] == ["query", "response", "finish", "label", "images", "image_keys"]
            assert row["finish"] in ("stop", "length")
        header = json.loads(result.output.with_suffix(".settings.json").read_text())
        assert header["settings"]["max_new_tokens"] == 8
        assert header["settings"]["temperature"] == 0.0

    def test_any_file_without_replies(self, run, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)
        rows = [{"query": "Hi.", "id": 7}, {"query": "<image>?", "images": ["chart.png"]}]
        file = write_jsonl(tmp_path / "ask.jsonl", rows)
        target = tmp_path / "out" / "answers.jsonl"
        result = answer(run, dataset=(str(file),), image_root=GOLDEN / "images", output=target)
        assert [row["query"] for row in result.rows] == ["Hi.", "<image>?"]
        assert [row["label"] for row in result.rows] == [None, None]
        assert result.rows[1]["images"] == [str(GOLDEN / "images" / "chart.png")]
        assert [json.loads(line) for line in target.read_text().splitlines()] == result.rows
        assert capfd.readouterr().err.endswith("2 replies in out/answers.jsonl\n")

    def test_batches_change_nothing(self, run, tmp_path):
        replies = [
            [
                row["response"]
                for row in answer(
                    run,
                    load_dataset_config=True,
                    batch_size=size,
                    output=tmp_path / f"{size}.jsonl",
                ).rows
            ]
            for size in (1, 4)
        ]
        assert replies[0] == replies[1]

    def test_merged_in_memory_says_the_same(self, run, tmp_path):
        both = [
            answer(run, load_dataset_config=True, merge_lora=merge, output=tmp_path / name).rows
            for merge, name in ((False, "a.jsonl"), (True, "b.jsonl"))
        ]
        assert [r["response"] for r in both[0]] == [r["response"] for r in both[1]]

    def test_a_data_file_of_the_run_that_is_gone(self, run, tmp_path, monkeypatch):
        config = json.loads((find_checkpoint(run) / "run_config.json").read_text())
        for name in ("gone.jsonl", "gone.csv#3"):
            copy = tmp_path / name[-1]
            shutil.copytree(run, copy)
            monkeypatch.chdir(copy)
            text = json.dumps({**config, "dataset": [str(copy / name)]})
            (find_checkpoint(copy) / "run_config.json").write_text(text)
            with pytest.raises(DataError, match=rf"^{name[:6]}\S*: no such file"):
                answer(copy, load_dataset_config=True)

    def test_it_goes_on_where_it_stopped(self, run, tmp_path, monkeypatch):
        target = tmp_path / "answers.jsonl"
        whole = answer(run, load_dataset_config=True, output=target, batch_size=2).rows
        lines = target.read_text().splitlines(keepends=True)
        target.write_text("".join(lines[:3]) + lines[3][:20])
        asked = []
        original = Replier._generate

        def spy(self, prompts, seeds, numbers, *rest):
            asked.append(len(numbers))
            return original(self, prompts, seeds, numbers, *rest)

        monkeypatch.setattr(Replier, "_generate", spy)
        again = answer(run, load_dataset_config=True, output=target, batch_size=2).rows
        assert again == whole
        # A batch that was answered in part is answered again as a whole.
        assert len(whole) - 3 <= sum(asked) < len(whole)

    def test_answers_wait_for_those_before(self, run, tmp_path, monkeypatch):
        """Stopped after any batch, the command goes on to the same file, and nothing else stays."""
        rows = [
            {"query": f"<image>{'Is it? ' * number}", "images": [photo]}
            for number in range(3)
            for photo in ("photo_a.jpg", "photo_b.jpg")
        ]
        given = {
            "dataset": (str(write_jsonl(tmp_path / "ask.jsonl", rows)),),
            "image_root": GOLDEN / "images",
            "batch_size": 2,
        }
        whole = answer(run, output=tmp_path / "whole.jsonl", **given)
        target, kept = tmp_path / "stopped.jsonl", tmp_path / ".stopped.jsonl.waiting"
        original, lines = Replier._generate, []

        def stopping(self, *given):
            lines.append(target.read_bytes().count(b"\n") if target.exists() else 0)
            if len(lines) % 2 == 0:
                raise KeyboardInterrupt
            return original(self, *given)

        monkeypatch.setattr(Replier, "_generate", stopping)
        for _ in range(3):
            with suppress(KeyboardInterrupt):
                answer(run, output=target, **given)
            if kept.exists():
                with kept.open("ab") as file:
                    file.write(b'[3, {"query": "cut o')
        # Longest first: the first record is answered in the second batch.
        assert lines == [0, 0, 0, 1, 1]
        assert target.read_bytes() == whole.output.read_bytes()
        assert not kept.exists()

    def test_features_that_the_run_has_left(self, run, tmp_path, monkeypatch):
        encoded = []
        original = features.encode_batch

        def spy(model, processor, images, *rest):
            encoded.extend(images)
            return original(model, processor, images, *rest)

        monkeypatch.setattr(features, "encode_batch", spy)
        rows = {}
        for cache in ("auto", "off"):
            output = tmp_path / f"{cache}.jsonl"
            given = {"load_dataset_config": True, "vision_cache": cache, "output": output}
            rows[cache] = answer(run, **given).rows
            assert bool(encoded) == (cache == "off")
        assert rows["auto"] == rows["off"]

    def test_a_file_of_other_settings_or_data_is_kept(self, run, tmp_path):
        target = tmp_path / "answers.jsonl"
        count = len(answer(run, load_dataset_config=True, output=target).rows)
        before = target.read_bytes()
        with pytest.raises(CheckpointError, match="made with other settings, max_new_tokens 8"):
            answer(run, load_dataset_config=True, output=target, max_new_tokens=3)
        file = write_jsonl(tmp_path / "ask.jsonl", [{"query": "Hi."}] * count)
        with pytest.raises(CheckpointError, match="line 1 answers another record"):
            answer(run, dataset=(str(file),), output=target)
        assert target.read_bytes() == before

    def test_a_base_model_alone(self, tmp_path):
        file = write_jsonl(tmp_path / "ask.jsonl", [{"query": "Hello! What can you do for me?"}])
        config = vlft.InferConfig(
            model=str(CASE.folder), dataset=(str(file),), output=tmp_path / "o.jsonl",
            max_new_tokens=3, show_samples=0, device="cpu",
        )  # fmt: skip
        assert len(vlft.infer(config).rows) == 1

    def test_samples_are_shown(self, run, capsys, monkeypatch):
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        answer(run, load_dataset_config=True, show_samples=1, overwrite=True)
        assert [line.split("]")[0] for line in buffer.getvalue().splitlines()[:3]] == [
            "[prompt", "[output", "[label",
        ]  # fmt: skip

    def test_sampling_is_seeded(self, run, tmp_path):
        rows = [
            answer(
                run, load_dataset_config=True, temperature=1.0, seed=seed,
                output=tmp_path / f"{number}.jsonl",
            ).rows
            for number, seed in enumerate((1, 1, 2))
        ]  # fmt: skip
        texts = [[row["response"] for row in found] for found in rows]
        assert texts[0] == texts[1] != texts[2]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"load_dataset_config": True, "dataset": ("a.jsonl",)}, "one of the two is allowed"),
            ({"load_dataset_config": True, "ckpt_dir": ()}, "needs the run"),
            ({"merge_lora": True, "ckpt_dir": ()}, "needs an adapter"),
            ({"top_p": 0.5}, "found temperature 0"),
            ({"max_new_tokens": 0}, "--max-new-tokens: found 0, at least 1 is allowed"),
        ],
    )
    def test_settings_that_do_not_go_together(self, run, settings, message):
        with pytest.raises(UsageError, match=message):
            vlft.infer(vlft.InferConfig(**{"ckpt_dir": run, **settings}))


class Lines:
    """A pipe that is written while it is read."""

    def __init__(self, lines):
        self._lines = lines

    def __iter__(self):
        return self._lines

    def isatty(self):
        return False


class TestChat:
    def talk(self, lines, monkeypatch):
        model, processor = load()
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        chat(model, processor, Sampling(6), system=None, lines=io.StringIO("\n".join(lines)))
        return buffer.getvalue().splitlines()

    def replies(self, rows):
        model, processor = load()
        return [r.text for r in vlft.generate(model, processor, rows, 6, image_root=GOLDEN)]

    def test_history_images_and_commands(self, monkeypatch):
        image = GOLDEN / "images" / "chart.png"
        spoken = self.talk(
            ["Hi.", f"/image {image}", "What?", "", "/clear", "Hi.", "/system Be brief.", "Hi.",
             "/exit", "never asked"],
            monkeypatch,
        )  # fmt: skip
        first = self.replies([{"query": "Hi."}])[0]
        second = self.replies(
            [{"query": "<image>What?", "history": [["Hi.", first]], "images": [str(image)]}]
        )[0]
        third = self.replies([{"query": "Hi.", "system": "Be brief."}])[0]
        # A line for each line, empty ones to commands and to an empty line.
        expected = [first, "", second, "", "", first, "", third]
        assert spoken == [reply.replace("\n", "\\n") for reply in expected]

    def test_a_mistake_does_not_end_it(self, monkeypatch, capsys):
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        model, processor = load()
        lines = io.StringIO("/image no.png\n/nothing\nHi.\n")
        with pytest.raises(VlftError, match="2 of 3 lines led to an error"):
            chat(model, processor, Sampling(6), system=None, lines=lines)
        reply = self.replies([{"query": "Hi."}])[0]
        assert buffer.getvalue().splitlines() == ["", "", reply.replace("\n", "\\n")]
        assert capsys.readouterr().err.splitlines() == [
            "error: line 1: no.png: no such image",
            " hint: relative paths start at the working directory",
            "error: line 2: no command /nothing",
            " hint: /help lists the commands",
        ]

    def test_a_full_window_from_a_pipe(self, monkeypatch, capsys):
        """The lines stay those of the input, and after /clear it goes on."""
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        model, processor = load()
        long = " ".join(["word"] * (processor.max_length // 2))
        lines = ["Hi.", long, long, "Hi.", "/clear", "Hi."]
        with pytest.raises(VlftError, match=r"[12] of 6 lines led to an error"):
            chat(model, processor, Sampling(4), system=None, lines=io.StringIO("\n".join(lines)))
        spoken = buffer.getvalue().splitlines()
        assert len(spoken) == 6
        assert spoken[0] == spoken[5]
        assert spoken[0]
        assert not spoken[2]
        assert "in a chat: /clear" in capsys.readouterr().err

    def failing(self, lines, monkeypatch, capsys, **settings):
        """Lines of the output and of stderr of a chat in which something fails."""
        model, processor = load()
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        with pytest.raises(VlftError, match="lines led to an error"):
            chat(model, processor, Sampling(6), system=None, lines=lines, **settings)
        return buffer.getvalue().splitlines(), capsys.readouterr().err.splitlines()

    @pytest.mark.parametrize(
        "wrong",
        ["你好".encode("gbk"), "Ü".encode("latin-1"), "Hi".encode("utf-16-le"), b"\xed\xa0\x80"],
    )
    def test_bytes_that_are_not_utf_8(self, monkeypatch, capsys, wrong):
        good = b"\xef\xbb\xbfHi.\r\n"
        lines = io.TextIOWrapper(io.BytesIO(good + wrong + b"\n/clear\n" + good))
        spoken, errors = self.failing(lines, monkeypatch, capsys)
        reply = self.replies([{"query": "Hi."}])[0].replace("\n", "\\n")
        assert spoken == [reply, "", "", reply]
        assert errors[0].startswith("error: line 2: not UTF-8 (")
        assert errors[1:] == [" hint: save or type the text as UTF-8"]

    def test_half_characters_of_a_terminal(self, monkeypatch, capsys):
        lines = io.StringIO("/system caf\udce9\nHi. \udce9\n")
        spoken, errors = self.failing(lines, monkeypatch, capsys)
        assert spoken == ["", ""]
        assert [line[:40] for line in errors[::2]] == [
            f"error: line {n}: not UTF-8 (found '\\udce9'" [:40] for n in (1, 2)
        ]  # fmt: skip
        with pytest.raises(ConfigError, match="--system: not UTF-8"):
            vlft.infer(vlft.InferConfig(model=str(CASE.folder), system="caf\udce9"))

    @pytest.mark.parametrize(
        "written",
        ['"a b.png"', "'a b.png'", "a\\ b.png", "a b.png", "~/a b.png", '"~/a b.png"',
         "file://{}/a%20b.png", "{}/a b.png", "a\\ b.png 'a b.png'"],
    )  # fmt: skip
    def test_paths_as_terminals_write_them(self, monkeypatch, capsys, tmp_path, written):
        Image.new("RGB", (64, 48)).save(tmp_path / "a b.png")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        self.talk([f"/image {written.format(tmp_path)}"], monkeypatch)
        assert capsys.readouterr().err.startswith("attached a b.png, 64 x 48 pixels")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/image", "/image without a path\n hint: write /image PATH"),
            ("/image .", r"\.: not a file\n hint: name another image"),
            ("/image no.jpg", "no.jpg: no such image\n hint: relative paths start at the working"),
            ("/image " + "x" * 300, "File name too long.\n hint: name another image"),
            ("/image notes.txt", "notes.txt: not an image of a known format\n hint: name another"),
            ("/image ftp://example.org/a.jpg", "web addresses are allowed\n hint: download the"),
            ('/image "a b', "no such image"),
            (
                "<image>Which digit?",
                "images attached: 0, the message has another number of <image>",
            ),
            ("<image_placeholder>?", "images attached: 0"),
            ("/system See <image>", "found <image> in the system prompt"),
        ],
    )
    def test_mistakes_have_hints_of_a_chat(self, monkeypatch, capsys, tmp_path, line, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes.txt").write_text("notes")
        _, errors = self.failing(io.StringIO(line), monkeypatch, capsys)
        assert re.search(message, "\n".join(errors))
        assert not re.search("data|record|--image-root|--on-bad", "\n".join(errors))

    def test_an_image_stays_what_it_was(self, monkeypatch, tmp_path):
        """It is written anew under its name, and then removed, between the turns."""
        photos = [GOLDEN / "images" / name for name in ("chart.png", "photo_a.jpg")]
        shot = tmp_path / "shot.png"

        def lines():
            for photo in photos:
                shutil.copy(photo, shot)
                yield f"/image {shot}"
                yield "<image>?" if photo is photos[0] else "And this?"
            shot.unlink()
            yield "Sure?"

        model, processor = load()
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        chat(model, processor, Sampling(6), system=None, lines=Lines(lines()))
        spoken = [text for text in buffer.getvalue().splitlines() if text]
        history: list = []
        for count, query in ((1, "<image>?"), (2, "<image>And this?"), (2, "Sure?")):
            row = {"query": query, "history": history, "images": [str(p) for p in photos[:count]]}
            reply = self.replies([row])[0]
            history = [*history, [query, reply]]
        assert spoken == [reply.replace("\n", "\\n") for _, reply in history]

    @pytest.mark.parametrize("case", TALKING, indirect=True, scope="session")
    def test_a_reply_with_an_image_tag_ends_no_chat(self, monkeypatch, processor, shared_model):
        """DeepSeek-VL2 shows special tokens, and any model can spell a tag."""
        tag = processor.family.image_tag
        said = iter([f"{tag[:3]}{tag}{tag[3:]}See", tag, "end"])
        asked = []

        def reply(_model, _processor, prompts, *_):
            asked.append(prompts[0])
            return [Reply(next(said), [], "stop")]

        monkeypatch.setattr(infer_chat, "generate_replies", reply)
        lines = io.StringIO("Hi\nWhat?\nHello?\n")
        chat(shared_model, processor, Sampling(3), system=None, lines=lines)
        expected = processor.encode({"query": "What?", "history": [["Hi", "See"]]})
        assert torch.equal(asked[1].input_ids, expected.input_ids)
        assert len(asked) == 3

    def test_without_standard_input(self, monkeypatch):
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(ConfigError, match="no standard input for a chat"):
            vlft.infer(vlft.InferConfig(model=str(CASE.folder), device="cpu"))

    def test_an_output_that_lacks_a_character(self, monkeypatch):
        file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
        monkeypatch.setattr(out, "_file", file)
        console.reply("Ü 你\n")
        assert file.buffer.getvalue().decode("latin-1") == "Ü \\u4f60\n"

    def test_help_lists_the_commands(self, monkeypatch, capsys):
        assert self.talk(["/help"], monkeypatch) == [""]
        text = capsys.readouterr().err
        for command in (
            "/image PATH", "/system TEXT", "/clear", "/regenerate", "/adapter off", "/save PATH",
            "/help", "/exit", "Ctrl-C",
        ):  # fmt: skip
            assert command in text

    def test_image_says_what_it_attached(self, monkeypatch, capsys, tmp_path):
        Image.new("RGB", (640, 48)).save(tmp_path / "my photo.png")
        monkeypatch.setenv("HOME", str(tmp_path))
        self.talk(["/image ~/my photo.png", f"/image '{tmp_path}/my photo.png'"], monkeypatch)
        attached = "attached my photo.png, 640 x 48 pixels; images of the next message:"
        assert capsys.readouterr().err.splitlines() == [f"{attached} 1", f"{attached} 2"]

    def test_ctrl_c_ends_a_reply_and_then_the_chat(self, monkeypatch):
        """At a terminal: first within a reply, whose start is remembered, then at the prompt."""
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        typed = iter(["Hi.", "What?"])
        printed = []

        def read_line(_):
            line = next(typed, None)
            if line is None:
                raise KeyboardInterrupt
            return line

        def print_reply(text):
            printed.append(text)
            if len(printed) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(console.err, "input", read_line)
        monkeypatch.setattr(console, "reply", print_reply)
        model, processor = load()
        chat(model, processor, Sampling(6), system=None, lines=terminal)
        cut = printed[0]
        assert printed[1:3] == ["", "\n"]
        assert "".join(printed[3:]).strip() == self.replies(
            [{"query": "What?", "history": [["Hi.", cut]]}]
        )[0]  # fmt: skip


class TestApi:
    def test_load_encode_collate(self):
        model, processor = load()
        row = {"query": "<image>What?", "response": "A cat.", "images": ["images/photo_a.jpg"]}
        sample = processor.encode(row, image_root=GOLDEN)
        assert isinstance(sample, EncodedSample)
        assert sample.input_ids.shape == sample.labels.shape
        assert sample.text.endswith("Assistant: A cat.<｜end▁of▁sentence｜>")
        inputs = processor.collate([sample, processor.encode({"query": "Hi."})])
        with torch.no_grad():
            logits = model(**inputs).logits
        assert logits.shape == (*inputs["input_ids"].shape, model.config.text_config.vocab_size)

    def test_trained_tokens_decode_to_the_replies(self):
        _, processor = load()
        row = {"query": "b", "response": "It is 12.", "history": [["a", "是 of 3."]]}
        sample = processor.encode(row)
        trained = sample.labels[sample.labels != -100].tolist()
        text = processor.chat.tokenizer.decode(trained, skip_special_tokens=False)
        eos = processor.chat.eos_token
        assert text == f" 是 of 3.{eos} It is 12.{eos}"

    def test_a_prompt_is_the_start_of_its_answer(self):
        """What is generated after is what was trained after."""
        _, processor = load()
        for reply in ("It is.", "你好", "(x)", "123", "\u00e9t\u00e9", "<b>"):
            prompt = processor.encode({"query": "What?"}).input_ids
            whole = processor.encode({"query": "What?", "response": reply})
            assert torch.equal(whole.input_ids[: len(prompt)], prompt)
            assert (whole.labels[: len(prompt)] == -100).all()
            assert (whole.labels[len(prompt) :] != -100).all()

    def test_system_prompts(self):
        _, processor = load()
        texts = [
            processor.encode({"query": "Hi.", **extra}).text
            for extra in ({}, {"system": ""}, {"system": "Be brief."}, {"system": None})
        ]
        assert texts[1] == "User: Hi.\n\nAssistant:"
        assert texts[2] == "Be brief.\n\nUser: Hi.\n\nAssistant:"
        assert texts[0] == texts[3]
        assert texts[0].startswith("You are a helpful language and vision assistant.")

    def test_an_adapter(self, run):
        model, processor = load(adapter=find_checkpoint(run))
        row = {"query": "<image>What is number 1?", "images": ["images/photo_b.jpg"]}
        base, _ = load()
        tuned = vlft.generate(model, processor, [row], 8, image_root=GOLDEN)[0]
        plain = vlft.generate(base, processor, [row], 8, image_root=GOLDEN)[0]
        assert tuned.text.startswith("It is")
        assert tuned.token_ids != plain.token_ids

    def test_replies_do_not_depend_on_their_neighbours(self):
        model, processor = load()
        rows = [{"query": "Hi there."}, {"query": "<image>?", "images": ["images/chart.png"]}]
        together = vlft.generate(model, processor, rows, 8, image_root=GOLDEN)
        alone = [vlft.generate(model, processor, [r], 8, image_root=GOLDEN)[0] for r in rows]
        assert together == alone

    @pytest.mark.parametrize("case", ONE_EACH, indirect=True, scope="session")
    def test_a_long_neighbour_cuts_no_reply(self, processor, shared_model):
        """Each record has the room that it has alone, and says how its reply ended."""
        short = processor.encode({"query": "Hi."})
        ids = torch.cat([short.input_ids] * 40)
        small = dataclasses.replace(processor, max_length=len(ids) + 3)
        long = dataclasses.replace(short, input_ids=ids, labels=torch.full_like(ids, -100))
        together = generate_replies(shared_model, small, [long, short, long], Sampling(12))
        alone = [generate_replies(shared_model, small, [s], Sampling(12))[0] for s in (long, short)]
        assert together == [alone[0], alone[1], alone[0]]
        for reply, most, cut in zip(alone, (3, 12), ("window", "length"), strict=True):
            ended = reply.token_ids[-1] == processor.chat.eos_id
            assert reply.finish == ("stop" if ended else cut)
            assert ended or len(reply.token_ids) == most

    def test_a_reply_that_stops_says_so(self):
        model, processor = load()
        eos = vlft.generate(model, processor, [{"query": "Hi."}], 1)[0].token_ids[0]
        ends = dataclasses.replace(processor, chat=dataclasses.replace(processor.chat, eos_id=eos))
        prompts = [processor.encode({"query": "Hi."})]
        reply = generate_replies(model, ends, prompts, Sampling(1))[0]
        assert (reply.token_ids, reply.finish) == ([eos], "stop")

    def test_draws_of_a_row_are_its_own(self):
        model, processor = load()
        prompts = [processor.encode({"query": f"Hi{'.' * n}"}) for n in range(3)]
        sampling = Sampling(8, temperature=1.0, top_k=200, top_p=0.95)
        together = generate_replies(model, processor, prompts, sampling, seeds=[3, 1, 2])
        alone = [
            generate_replies(model, processor, [prompt], sampling, seeds=[seed])[0]
            for prompt, seed in zip(prompts, (3, 1, 2), strict=True)
        ]
        assert together == alone
        assert together != generate_replies(model, processor, prompts, sampling, seeds=[1, 2, 3])

    def test_draws_follow_the_probabilities(self):
        scores = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log().repeat(4000, 1)
        drawn = Draw(range(4000), scores.device)(None, scores).argmax(-1)
        share = torch.bincount(drawn, minlength=4) / 4000
        assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.25, 0.0]), atol=0.03)
        assert share[3] == 0

    def test_draws_of_the_api_follow_torchs_seed(self):
        model, processor = load()
        row = {"query": "Hi."}
        texts = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            texts.append(
                [vlft.generate(model, processor, [row], 6, temperature=1)[0].text for _ in "ab"]
            )
        assert texts[0] == texts[1] != texts[2]
        assert texts[0][0] != texts[0][1]

    @pytest.mark.parametrize("context", ["reply", "all"])
    def test_what_the_repetition_penalty_counts(self, context):
        """By hand, one token at a time; padding counts for nothing."""
        model, processor = load()
        rows = [{"query": "Hi."}, {"query": "Hi. " * 30}]
        prompts = [processor.encode(row) for row in rows]
        sampling = Sampling(10, repetition_penalty=1.6, repetition_context=context)
        together = generate_replies(model, processor, prompts, sampling)
        for prompt, reply in zip(prompts, together, strict=True):
            ids = prompt.input_ids.tolist()
            for _ in range(10):
                said = torch.tensor(ids if context == "all" else ids[len(prompt) :], dtype=int)
                with torch.no_grad():
                    scores = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
                known = scores[said]
                scores[said] = torch.where(known < 0, known * 1.6, known / 1.6)
                ids.append(int(scores.argmax()))
                if ids[-1] == processor.chat.eos_id:
                    break
            assert reply.token_ids == ids[len(prompt) :]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"temperature": 1e-38}, "found 1e-38, 0 .greedy. or at least 0.0001 is allowed"),
            ({"temperature": 9e-5}, "found 9e-05"),
            ({"temperature": -1.0}, "--temperature: found -1, at least 0"),
            ({"repetition_penalty": 1e-38}, "at least 0.01 is allowed"),
            ({"repetition_penalty": 1e38}, "at most 100 is allowed"),
            ({"top_k": 3}, "found temperature 0"),
            ({"repetition_context": "prompt"}, "allowed: reply, all"),
        ],
    )
    def test_settings_that_generate_nothing_are_refused(self, settings, message):
        """By the command and in Python alike."""
        with pytest.raises(UsageError, match=message):
            Sampling(**settings)
        with pytest.raises(UsageError, match=message):
            vlft.infer(vlft.InferConfig(model=str(CASE.folder), **settings))

    @pytest.mark.parametrize("temperature", [1e-4, 1e30])
    def test_extreme_temperatures(self, temperature):
        model, processor = load()
        greedy, drawn = (
            vlft.generate(model, processor, [{"query": "Hi."}], 3, temperature=t)[0].token_ids
            for t in (0, temperature)
        )
        assert (greedy == drawn) == (temperature < 1)

    def test_the_defaults_are_those_of_the_command(self):
        config = vlft.InferConfig()
        parameters = inspect.signature(vlft.generate).parameters
        for name, default in asdict(Sampling()).items():
            assert default == getattr(config, name) == parameters[name].default, name

    def test_sampling_settings_of_greedy_decoding(self):
        model, processor = load()
        with pytest.raises(ConfigError, match=r"found temperature 0 \(greedy\)"):
            vlft.generate(model, processor, [{"query": "Hi."}], top_p=0.5)

    def test_no_rows(self):
        model, processor = load()
        assert generate_replies(model, processor, [], Sampling()) == []

    @pytest.mark.parametrize("name", vlft.__all__)
    def test_public_names(self, name):
        assert getattr(vlft, name) is not None
        assert name in dir(vlft)

    def test_imports_say_nothing_of_bitsandbytes(self, monkeypatch):
        """peft imports it, and it warns of kernels that nothing needs here."""
        log = logging.getLogger("bitsandbytes")
        levels = []
        monkeypatch.delitem(vlft.__dict__, "load", raising=False)
        monkeypatch.setattr(log, "level", logging.INFO)
        original = importlib.import_module
        monkeypatch.setattr(
            importlib, "import_module", lambda name: levels.append(log.level) or original(name)
        )
        assert vlft.load
        assert (levels, log.level) == ([logging.ERROR], logging.INFO)

    def test_unknown_names(self):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            vlft.nothing  # noqa: B018

    def test_a_prompt_without_room(self):
        model, processor = load()
        with pytest.raises(DataError, match="less than 16384 are allowed"):
            vlft.generate(model, processor, [{"query": "word " * 9000}], 8)

    def test_no_adapter_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
            load(adapter=tmp_path)

    def test_a_gpu_that_is_not_there(self):
        with pytest.raises(ConfigError, match="found no usable GPU"):
            vlft.load(CASE.folder, device="cuda")


def test_another_file_is_never_emptied(run, tmp_path):
    """A result file that is none: kept to the last byte."""
    target = tmp_path / "notes.json"
    for content in ('{\n  "mine": 1\n}\n', "notes", '{"query": 1}\nnotes\n'):
        target.write_text(content)
        with pytest.raises(CheckpointError, match=r"is no result line|answers another record"):
            answer(run, load_dataset_config=True, output=target)
        assert target.read_text() == content
