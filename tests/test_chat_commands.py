"""Commands of a chat: /regenerate, /adapter, /save; /image with addresses and several images."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import GOLDEN, SIGLIP
from served import make_adapter

import vlft
from vlft.console import out
from vlft.errors import VlftError
from vlft.inference import run as inference
from vlft.inference.chat import chat
from vlft.inference.generate import Sampling

IMAGES = GOLDEN / "images"


@pytest.fixture(scope="module")
def loaded():
    return vlft.load(SIGLIP.folder, device="cpu")


@pytest.fixture
def talk(loaded, monkeypatch, tmp_path):
    """A function that returns the lines of the output to lines of the input."""
    monkeypatch.chdir(tmp_path)

    def say(*lines, sampling=Sampling(6), **settings):  # noqa: B008 (frozen)
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        try:
            chat(*loaded, sampling, system=None, lines=io.StringIO("\n".join(lines)), **settings)
        finally:
            say.spoken = buffer.getvalue().splitlines()
        return say.spoken

    return say


class TestRegenerate:
    def test_a_sample_is_another(self, talk):
        torch.manual_seed(0)
        drawn = Sampling(12, temperature=3.0)
        spoken = talk("Hi.", "/regenerate", "/regenerate", "And?", sampling=drawn)
        assert len(spoken) == 4
        assert len(set(spoken[:3])) > 1

    def test_it_takes_the_place_of_the_reply(self, talk, loaded):
        image = f"/image {IMAGES / 'chart.png'}"
        spoken = talk(image, "What is it?", "/regenerate", "And?")
        assert spoken[1] == spoken[2]
        assert talk(image, "What is it?", "And?")[2] == spoken[3]

    def test_nothing_to_reply_to(self, talk, capsys):
        with pytest.raises(VlftError):
            talk("/regenerate")
        assert "no message to reply to again\n hint: write one first" in capsys.readouterr().err


class TestAdapter:
    def test_on_and_off(self, monkeypatch, tmp_path, capsys):
        adapter = make_adapter(SIGLIP.folder, tmp_path / "adapter", 1)
        lines = io.StringIO("Hi.\n/adapter off\n/regenerate\n/adapter on\n/regenerate\n")
        buffer = io.StringIO()
        monkeypatch.setattr(out, "_file", buffer)
        monkeypatch.setattr(inference.sys, "stdin", lines)
        given = {"max_new_tokens": 6, "device": "cpu"}
        vlft.infer(vlft.InferConfig(ckpt_dir=(adapter,), **given))
        tuned, _, base, _, again = buffer.getvalue().splitlines()
        assert tuned == again != base
        said = capsys.readouterr().err
        assert "the base replies\nthe tuned model replies\n" in said
        model, processor = vlft.load(SIGLIP.folder, device="cpu")
        (reply,) = vlft.generate(model, processor, [{"query": "Hi."}], 6)
        assert base == reply.text.replace("\n", "\\n")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/adapter", "/adapter: found '', on or off is allowed"),
            ("/adapter of", "/adapter: found 'of', on or off is allowed"),
            ("/adapter off", "no adapter that can be switched"),
        ],
    )
    def test_mistakes(self, talk, capsys, line, message):
        with pytest.raises(VlftError):
            talk(line)
        assert message in capsys.readouterr().err


class TestSave:
    def test_it_is_a_record_to_train_on(self, talk, loaded, tmp_path):
        image = IMAGES / "chart.png"
        spoken = talk(
            "/system Be brief.", f"/image {image}", "See <image>?", "And?", "/save kept.jsonl",
            "/clear", "Hi.", "/save kept.jsonl",
        )  # fmt: skip
        first, second = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
        assert first == {
            "query": "And?", "response": spoken[3].replace("\\n", "\n"),
            "history": [["See <image>?", spoken[2].replace("\\n", "\n")]],
            "images": [str(image)], "system": "Be brief.",
        }  # fmt: skip
        assert second["query"] == "Hi."
        processor = loaded[1]
        # What is trained is what was said.
        asked = processor.encode({k: v for k, v in first.items() if k != "response"})
        whole = processor.encode(first)
        assert whole.input_ids[: len(asked)].tolist() == asked.input_ids.tolist()

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["Hi.", "/save"], "/save: found ''\n hint: write /save NAME.jsonl"),
            (["Hi.", "/save a.txt"], "/save: found 'a.txt'"),
            (["/save a.jsonl"], "there is no dialogue yet"),
            (["Hi.", "/save no/a.jsonl"], "cannot be written (No such file or directory)"),
            (["Hi.", "/save d.jsonl"], "d.jsonl: not a regular file"),
        ],
    )
    def test_mistakes(self, talk, tmp_path, capsys, lines, message):
        (tmp_path / "d.jsonl").mkdir()
        with pytest.raises(VlftError):
            talk(*lines)
        assert message in capsys.readouterr().err


class Handler(BaseHTTPRequestHandler):
    """Serves the golden images."""

    def do_GET(self):
        data = (IMAGES / self.path.strip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class TestImages:
    def test_an_address_and_a_file_at_once(self, talk, address, capsys, tmp_path):
        local = IMAGES / "photo_a.jpg"
        alone = talk(f"/image {IMAGES / 'chart.png'}", f"/image {local}", "Which?")[2]
        both = f"/image {address}/chart.png {local}"
        assert talk(both, "Which?", "/save kept.jsonl", allow_private=True)[1] == alone
        saved = json.loads((tmp_path / "kept.jsonl").read_text())
        assert saved["images"] == [f"{address}/chart.png", str(local)]
        assert "attached chart.png" in capsys.readouterr().err

    def test_an_address_that_is_not_public(self, talk, address, capsys):
        with pytest.raises(VlftError):
            talk(f"/image {address}/chart.png")
        assert "--allow-private-urls" in capsys.readouterr().err


def test_the_flag_is_for_chats_too(monkeypatch):
    monkeypatch.setattr(inference.sys, "stdin", io.StringIO(""))
    config = vlft.InferConfig(model=str(SIGLIP.folder), allow_private_urls=True, device="cpu")
    assert vlft.infer(config) is None
