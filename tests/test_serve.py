"""``vlft serve``, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import pytest
from conftest import GOLDEN, JANUS, OCR, SIGLIP, VL2_NOAUX, write_jsonl
from PIL import Image
from served import image_url, make_adapter, serving, user, wait_for
from subprocesses import start

import vlft
from vlft.config import ServeConfig
from vlft.config.serving import KEY_VARIABLE
from vlft.errors import ConfigError, DataError, VlftError
from vlft.inference.replier import Replier
from vlft.serving.engine import Engine
from vlft.serving.models import find_models, placement
from vlft.serving.requests import KNOWN
from vlft.serving.run import bind, check_libraries
from vlft.settings import build, to_json

TOKENS = 12
BASE = SIGLIP.checkpoint
FIRST, SECOND = "photo_a.jpg", "chart.png"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of one base, of different kinds."""
    home = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(SIGLIP.folder, home / "one", 1, train_aligner=True),
        make_adapter(SIGLIP.folder, home / "two", 2, target_modules="ALL", use_dora=True),
    ]


@pytest.fixture(scope="module")
def server(adapters):
    config = ServeConfig(
        ckpt_dir=(str(adapters[0]), f"second={adapters[1]}"),
        device="cpu",
        max_new_tokens=TOKENS,
        max_images=3,
        max_image_pixels=2_000_000,
        max_request_mb=2,
        max_queue=24,
    )
    with serving(config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, *messages, model=BASE, **settings):
    given = messages or (user("What is it?", image_url(FIRST)),)
    return client.chat.completions.create(model=model, messages=list(given), **settings)


def text(client, *messages, **settings):
    return ask(client, *messages, **settings).choices[0].message.content


def inferred(tmp_path, rows, **settings):
    """The replies of ``vlft infer``, each record alone."""
    config = vlft.InferConfig(
        dataset=(str(write_jsonl(tmp_path / "ask.jsonl", rows)),),
        image_root=GOLDEN / "images",
        output=tmp_path / "answers.jsonl",
        overwrite=True,
        show_samples=0,
        batch_size=1,
        device="cpu",
        max_new_tokens=TOKENS,
        **settings,
    )
    return [row["response"] for row in vlft.infer(config).rows]


class TestReplies:
    @pytest.mark.parametrize("case", [SIGLIP, VL2_NOAUX, JANUS, OCR], ids=str)
    def test_are_those_of_infer(self, case, tmp_path):
        """Asked at once, and so answered together, streamed or not."""
        rows = [
            {"query": "<image>What is it?", "images": [FIRST]},
            {"query": "<image>What is number 1 there, and how many?", "images": [SECOND]},
            {"query": "<image>What is it?", "images": [FIRST]},
        ]
        asked = [[user(row["query"][7:], image_url(row["images"][0]))] for row in rows]
        if not case.image_mode:
            rows += [
                {"query": "Hello.", "system": "Be brief."},
                {"query": "And <image>?", "history": [["<image>What is it?", "It is 1."]],
                 "images": [FIRST, SECOND]},
            ]  # fmt: skip
            said = {"role": "assistant", "content": "It is 1."}
            parts = [
                {"type": "text", "text": "And "},
                {"type": "image_url", "image_url": {"url": image_url(SECOND)}},
                {"type": "text", "text": "?"},
            ]
            asked += [
                [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}],
                [user("What is it?", image_url(FIRST)), said, {"role": "user", "content": parts}],
            ]
        expected = inferred(tmp_path, rows, model=str(case.folder), image_mode=case.image_mode)
        config = ServeConfig(
            model=str(case.folder), image_mode=case.image_mode, device="cpu", max_new_tokens=TOKENS
        )
        with serving(config) as running, ThreadPoolExecutor(len(asked)) as pool:
            client = running.client()

            def whole(messages):
                return text(client, *messages, model=case.checkpoint)

            def streamed(messages):
                events = ask(client, *messages, model=case.checkpoint, stream=True)
                return "".join(event.choices[0].delta.content or "" for event in events)

            assert list(pool.map(whole, asked)) == expected
            assert list(pool.map(streamed, asked)) == expected
            assert max(running.batches) > 1

    def test_base_and_adapters(self, client, adapters, tmp_path):
        """Each time the other model than before, with one base in memory."""
        rows = [{"query": "<image>What is it?", "images": [FIRST]}]
        names = {BASE: (), "one": adapters[:1], "second": adapters[1:]}
        expected = {
            name: inferred(tmp_path, rows, model=str(SIGLIP.folder), ckpt_dir=tuple(found))[0]
            for name, found in names.items()
        }
        assert len(set(expected.values())) == 3
        for name in (*names, *names, "second", BASE):
            assert text(client, model=name) == expected[name]

    def test_parameters(self, client):
        reply = ask(client, max_tokens=5)
        assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (5, "length")
        longer = ask(client, max_completion_tokens=7)
        assert longer.usage.completion_tokens == 7
        assert longer.choices[0].message.content.startswith(reply.choices[0].message.content)
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + 5
        assert reply.model == BASE

    def test_seeds(self, client):
        def drawn(**settings):
            return text(client, temperature=1.5, top_p=0.95, **settings)

        assert drawn(seed=1) == drawn(seed=1)
        assert drawn(seed=1) != drawn(seed=2)
        assert drawn() != drawn()
        greedy = text(client)
        assert text(client, temperature=0, top_p=0.1, extra_body={"top_k": 3}) == greedy

    def test_stop(self, client):
        whole = text(client)
        stop = whole[4:6]
        reply = ask(client, stop=[stop, "no such text"])
        assert reply.choices[0].message.content == whole.partition(stop)[0].strip()
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens < TOKENS
        events = ask(client, stop=stop, stream=True)
        pieces = [event.choices[0].delta.content or "" for event in events]
        assert "".join(pieces) == whole.partition(stop)[0].strip()

    def test_usage_of_a_stream(self, client):
        whole = ask(client)
        events = list(ask(client, stream=True, stream_options={"include_usage": True}))
        assert events[-1].usage == whole.usage
        assert events[-1].choices == []
        assert [event.usage for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-2].choices[0].finish_reason == "length"
        assert events[0].choices[0].delta.role == "assistant"
        assert len({event.id for event in events}) == 1
        assert ask(client, stream=True).response.headers["content-type"].startswith("text/event")

    def test_tags_place_images(self, client):
        """As in data files, for prompts that have a new line after the image."""
        placed = user("<image>\nWhat is it?", image_url(FIRST))
        parts = [
            {"type": "image_url", "image_url": {"url": image_url(FIRST), "detail": "low"}},
            {"type": "text", "text": "\n"},
            {"type": "text", "text": "What is it?"},
        ]
        assert text(client, placed) == text(client, {"role": "user", "content": parts})


class TestModels:
    def test_list(self, client):
        rows = {row.id: row for row in client.models.list()}
        assert list(rows) == [BASE, "one", "second"]
        assert [row.parent for row in rows.values()] == [None, BASE, BASE]
        assert client.models.retrieve("second") == rows["second"]

    def test_of_another_name(self, client):
        with pytest.raises(openai.NotFoundError) as error:
            ask(client, model="third")
        assert error.value.code == "model_not_found"
        assert "no model 'third'; there are: deepseek-vl-siglip, one, second" in str(error.value)

    def test_health(self, server):
        found = httpx2.get(f"{server.url}/health").json()
        assert found == {"status": "ok", "waiting": 0, "running": 0}


WRONG = [
    ({"n": 2}, "n: found 2, which is not supported; allowed: 1"),
    ({"n": True}, "n: found true, which is not supported; allowed: 1"),
    ({"logprobs": True}, "logprobs: found true, which is not supported; allowed: false"),
    ({"tools": [{"type": "function"}]}, 'tools: found [{"type": "function"}], which is not'),
    ({"response_format": {"type": "json_object"}}, "response_format: found"),
    ({"presence_penalty": 0.5}, "presence_penalty: found 0.5"),
    ({"best_of": 2}, "best_of: a field that is not supported"),
    ({"max_token": 2}, "max_token: a field that is not supported (hint: did you mean 'max_tokens"),
    ({"temperature": "hot"}, 'temperature: found "hot", a number from 0 to 100 is allowed'),
    ({"temperature": -1}, "temperature: found -1"),
    ({"temperature": 1e-9}, "temperature: found 1e-09, 0 (greedy) or at least 0.0001 is allowed"),
    ({"top_p": 0}, "top_p: found 0, more than 0 is allowed"),
    ({"max_tokens": 0}, "max_tokens: found 0, a whole number from 1"),
    ({"max_tokens": 2.5}, "max_tokens: found 2.5, a whole number"),
    ({"seed": 2**64}, "seed: found"),
    ({"stop": [""]}, 'stop: found [""]'),
    ({"stop": 3}, "stop: found 3"),
    ({"stream": "yes"}, 'stream: found "yes", true or false is allowed'),
    ({"stream_options": {"include_usage": True}}, "stream_options: found without stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x: a field that is not"),
    ({"model": None}, "model: found nothing, a name is needed"),
    ({"stop": 3, "model": "\ud800"}, "stop: found 3"),
    ({"messages": []}, "messages: a list with a message is needed"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: one of system"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: a text or an image is needed"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name: a field"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
        "messages[1].role: found user, assistant is needed here",
    ),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        "messages[1]: the last message must be the user's",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type: text or image_url is allowed",
    ),
    (
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "messages[0].content: found half of a surrogate pair",
    ),
    (
        {"messages": [{"role": "system", "content": [{"type": "image_url", "image_url": {
            "url": "data:,"}}]}, {"role": "user", "content": "x"}]},
        "messages[0].content[0].image_url.url: images belong into the messages of the user",
    ),
]  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda v: json.dumps(v)[:40])
    def test_bodies(self, server, change, message):
        """Whatever is not done is named, with what is allowed."""
        body = {"model": BASE, "messages": [{"role": "user", "content": "Hi."}], **change}
        given = post(server, json.dumps(body).encode())
        assert given.status_code == 400
        error = given.json()["error"]
        assert error["message"].startswith(message)
        assert error["type"] == "invalid_request_error"
        assert error.keys() == {"message", "type", "param", "code"}

    @pytest.mark.parametrize(
        ("body", "found"),
        [
            (b"{", "the body is not JSON"),
            (b"[]", "the body is a list, an object is needed"),
            (b'{"a": NaN}', "NaN is no number of JSON"),
            (b"\xff", "the body is not JSON"),
            (b"[" * 100_000, "too deeply nested"),
        ],
    )
    def test_no_json(self, server, body, found):
        given = post(server, body)
        assert given.status_code == 400
        assert found in given.json()["error"]["message"]

    def test_what_vlmevalkit_sends_is_taken(self, client):
        """All contents are lists of parts, images say how closely to look."""
        image = {"url": image_url(FIRST), "detail": "low"}
        parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "What is it?"}]
        system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        given = {"n": 1, "temperature": 0, "max_tokens": 5}
        made = text(client, system, {"role": "user", "content": parts}, **given)
        plain = {"role": "system", "content": "Be brief."}
        assert made == text(client, plain, user("What is it?", image_url(FIRST)), max_tokens=5)

    def test_what_is_neutral_is_taken(self, client):
        neutral = {
            "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "tools": [],
            "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"},
            "logit_bias": {}, "stop": None, "top_logprobs": None,
        }  # fmt: skip
        body = {name: value for name, value in neutral.items() if value is not None}
        assert text(client, **body) == text(client)

    @pytest.mark.parametrize(
        ("url", "found"),
        [
            ("data:image/png;base64,AAAA", "zeros alone, so it was not written whole"),
            ("data:image/png;base64,A", "the image is not base64"),
            ("data:image/png,abc", "a data: URI in base64 or an http(s) address is needed"),
            ("file:///etc/passwd", "a data: URI in base64 or an http(s) address is needed"),
            ("/etc/passwd", "a data: URI in base64 or an http(s) address is needed"),
            ("http://127.0.0.1:1/a.png", "an address that is not public"),
            ("http://[::1]/a.png", "an address that is not public"),
        ],
    )
    def test_images(self, client, url, found):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, user("What?", image_url(FIRST), url))
        assert error.value.code == "invalid_image"
        assert error.value.param == "messages[0].content[1].image_url.url"
        assert found in str(error.value)

    def test_too_many_images_and_tags(self, client):
        with pytest.raises(openai.BadRequestError, match="4 images, at most 3 are allowed"):
            ask(client, user("What?", *[image_url(FIRST)] * 4))
        with pytest.raises(openai.BadRequestError, match="1 image listed, 2 <image> in the text"):
            ask(client, user("<image> <image>", image_url(FIRST)))

    def test_too_large(self, server, client):
        with pytest.raises(openai.BadRequestError, match="at most 2,000,000 are read"):
            ask(client, user("What?", too_many_pixels()))
        with pytest.raises(openai.APIStatusError) as error:
            ask(client, user("x" * 3_000_000))
        assert (error.value.status_code, error.value.code) == (413, "request_too_large")
        assert "the body is larger than 2,000,000 bytes" in str(error.value)
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, user("1 2 3 4 " * 10_000))
        assert error.value.code == "context_length_exceeded"

    def test_routes(self, server):
        for method, path, status in (
            ("GET", "/v1/chat/completions", 405),
            ("GET", "/", 404),
            ("GET", "/docs", 404),
            ("GET", "/openapi.json", 404),
            ("GET", "/v1/models/nothing", 404),
        ):
            given = httpx2.request(method, f"{server.url}{path}")
            assert given.status_code == status
            assert given.json()["error"]["message"]

    def test_pages_of_strangers(self, server):
        """What a page in a browser of this machine can send without being asked first."""
        url, body = f"{server.url}/v1/chat/completions", b"{}"
        given = httpx2.post(url, content=body, headers={"Content-Type": "text/plain"})
        assert (given.status_code, given.json()["error"]["code"]) == (415, "wrong_content_type")
        headers = {"Content-Type": "application/json", "Host": "evil.example"}
        given = httpx2.post(url, content=body, headers=headers)
        assert (given.status_code, given.json()["error"]["code"]) == (403, "wrong_host")
        assert "access-control-allow-origin" not in given.headers


def too_many_pixels():
    file = io.BytesIO()
    Image.new("1", (2000, 1001)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class TestFailures:
    """While a reply is made."""

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (VlftError("out of memory", hint="lower --batch-size"), "out of memory"),
            (RuntimeError("a detail"), "the server failed; its log says why"),
        ],
        ids=["known", "a fault"],
    )
    def test_of_the_model(self, client, monkeypatch, capfd, error, said):
        def fails(*_args, readers, **_settings):
            readers[0].take([5])
            raise error
            yield

        monkeypatch.setattr(Replier, "replies", fails)
        with pytest.raises(openai.InternalServerError) as whole:
            ask(client)
        assert whole.value.body == {
            "message": said, "type": "api_error", "param": None, "code": "failed",
        }  # fmt: skip
        with pytest.raises(openai.APIError, match=said):
            list(ask(client, stream=True))
        assert capfd.readouterr().err.count(f"a request failed: {name_of(error)}") == 2
        monkeypatch.undo()
        assert text(client)


def name_of(error):
    return "out of memory" if isinstance(error, VlftError) else "RuntimeError: a detail"


class TestManyAtOnce:
    def test_twenty(self, server, client):
        """In batches, each reply the one of its own request."""
        alone = {n: text(client, {"role": "user", "content": f"Count to {n}."}) for n in range(5)}
        before = len(server.batches)
        with ThreadPoolExecutor(20) as pool:
            made = list(
                pool.map(
                    lambda n: text(client, {"role": "user", "content": f"Count to {n % 5}."}),
                    range(20),
                )
            )
        assert made == [alone[n % 5] for n in range(20)]
        assert len(server.batches) - before < 10
        assert max(server.batches) <= 8

    def test_a_full_queue(self, adapters):
        config = ServeConfig(model=str(SIGLIP.folder), device="cpu", max_queue=2, batch_size=1)
        with serving(config) as running:
            client = running.client()
            with ThreadPoolExecutor(4) as pool:
                first = pool.submit(text, client, max_tokens=300)
                wait_for(lambda: health(running)["running"] == 1)
                others = [pool.submit(text, client, max_tokens=2) for _ in range(2)]
                wait_for(lambda: health(running)["waiting"] == 2)
                with pytest.raises(openai.RateLimitError) as error:
                    ask(client)
                assert error.value.code == "queue_full"
                assert error.value.response.headers["retry-after"] == "1"
                assert first.result()
                assert all(other.result() for other in others)


def post(server, body):
    headers = {"Content-Type": "application/json"}
    return httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)


def health(server):
    return httpx2.get(f"{server.url}/health").json()


@pytest.fixture(scope="module")
def locked():
    config = ServeConfig(model=str(SIGLIP.folder), device="cpu", api_key="right", max_new_tokens=2)
    with serving(config) as running:
        yield running


class TestKeys:
    @pytest.mark.parametrize("key", ["wrong", "righ", "right1", "Right"])
    def test_a_wrong_one(self, locked, key):
        with pytest.raises(openai.AuthenticationError) as error:
            ask(locked.client(key))
        assert error.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            locked.client(key).models.list()

    def test_the_right_one_or_none(self, locked):
        assert ask(locked.client("right")).usage.completion_tokens == 2
        assert httpx2.get(f"{locked.url}/v1/models").status_code == 401
        assert httpx2.get(f"{locked.url}/health").json()["status"] == "ok"

    def test_another_address_needs_one(self, monkeypatch):
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        found = "--api-key: --host 0.0.0.0 is reached by other machines, and requests need no key"
        with pytest.raises(ConfigError) as error:
            build(ServeConfig, {"host": "0.0.0.0"})
        assert str(error.value).startswith(found)
        for host in ("localhost", "127.0.0.2", "::1"):
            assert build(ServeConfig, {"host": host}).key == ""
        assert build(ServeConfig, {"host": "0.0.0.0", "api_key": "k"}).key == "k"
        monkeypatch.setenv(KEY_VARIABLE, "of the environment")
        with pytest.raises(ConfigError, match="holds a space"):
            build(ServeConfig, {"host": "0.0.0.0"})
        monkeypatch.setenv(KEY_VARIABLE, "environment")
        assert build(ServeConfig, {"host": "0.0.0.0"}).key == "environment"


class TestFound:
    """Which models are served, before one is loaded."""

    def find(self, *folders, **settings):
        return find_models(ServeConfig(ckpt_dir=tuple(map(str, folders)), **settings))

    def test_names(self, adapters, tmp_path):
        found = self.find(adapters[0], f"my name={adapters[1]}")
        assert (found.name, list(found.tuned)) == (BASE, ["one", "my name"])
        with_sign = tmp_path / "a=b"
        shutil.copytree(adapters[0], with_sign)
        assert list(self.find(with_sign).tuned) == ["a=b"]
        assert self.find(adapters[0], model=str(SIGLIP.folder)).name == BASE
        assert find_models(ServeConfig(model=str(SIGLIP.folder))).name == BASE

    def test_a_name_twice(self, adapters):
        with pytest.raises(ConfigError, match="two models have the name one"):
            self.find(adapters[0], f"one={adapters[1]}")
        with pytest.raises(ConfigError, match=f"two models have the name {BASE}"):
            self.find(f"{BASE}={adapters[0]}")
        with pytest.raises(ConfigError, match="printable characters are needed"):
            self.find(f"a\nb={adapters[0]}")

    def test_of_another_base(self, adapters, tmp_path):
        other = make_adapter(JANUS.folder, tmp_path / "other", 1)
        with pytest.raises(ConfigError, match=r"other has the base .*janus, one .*siglip"):
            self.find(adapters[0], other)

    def test_trained_in_different_ways(self, adapters):
        found = self.find(*adapters)
        ways = [
            replace(tuned, settings=replace(tuned.settings, quantize=way))
            for tuned, way in zip(found.tuned.values(), ("nf4", "none"), strict=True)
        ]
        with pytest.raises(ConfigError) as error:
            placement(ServeConfig(), ways)
        assert str(error.value) == (
            "--quantize: the adapters were trained with nf4 and none\n"
            " hint: say which to serve them with"
        )
        assert placement(ServeConfig(quantize="none", device="cpu"), ways).quantize == "none"
        assert placement(ServeConfig(device="cpu"), ways[:1]).quantize == "nf4"

    def test_a_whole_model(self, adapters, tmp_path):
        """A checkpoint of a full run is served alone, under its own name."""
        whole = tmp_path / "checkpoint-1"
        shutil.copytree(SIGLIP.folder, whole)
        settings = to_json(vlft.SftConfig(model=str(SIGLIP.folder), tuner="full"))
        (whole / "run_config.json").write_text(json.dumps(settings))
        config = ServeConfig(ckpt_dir=(f"whole={whole}",), device="cpu", max_new_tokens=3)
        with serving(config) as running:
            assert list(running.models.served) == ["whole"]
            assert text(running.client(), model="whole")
        with pytest.raises(ConfigError, match="is a whole model, which is served alone"):
            self.find(whole, adapters[0])


class TestStart:
    def test_a_library_that_is_missing(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
        with pytest.raises(ConfigError) as error:
            check_libraries("vlft serve")
        assert str(error.value) == ("vlft serve: needs fastapi\n hint: pip install 'vlft[serve]'")

    def test_a_port_in_use(self):
        with bind("127.0.0.1", 0) as listener:
            listener.listen()
            port = listener.getsockname()[1]
            with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
                bind("127.0.0.1", port)
        with pytest.raises(ConfigError, match="cannot listen on no such host:1"):
            bind("no such host", 1)


class TestEnds:
    def test_a_client_that_goes_in_the_middle(self, server, client):
        """Its reply ends, streamed or not, and others in its batch go on."""
        hello = {"role": "user", "content": "Hello."}
        alone = text(client, hello, max_tokens=100)
        before = list(server.jobs)
        with ThreadPoolExecutor(1) as pool:
            stream = ask(client, hello, max_tokens=3000, stream=True)
            wait_for(lambda: health(server)["running"] == 1)
            with silent_request(server, hello, max_tokens=3001):
                kept = pool.submit(text, client, hello, max_tokens=100)
                wait_for(lambda: health(server)["waiting"] == 2)
                next(iter(stream))
                stream.close()
                wait_for(lambda: health(server) == {"status": "ok", "waiting": 0, "running": 2})
            assert kept.result() == alone
        wait_for(lambda: health(server) == {"status": "ok", "waiting": 0, "running": 0})
        lost = [job for job in server.jobs if job not in before and job.most >= 3000]
        assert [job.most for job in lost] == [3000, 3001]
        assert all(job.cancelled and 0 < job.tokens < 2000 for job in lost)

    def test_a_client_that_goes_while_it_waits(self):
        config = ServeConfig(model=str(SIGLIP.folder), device="cpu", batch_size=1)
        with serving(config) as running, ThreadPoolExecutor(1) as pool:
            first = pool.submit(text, running.client(), max_tokens=300)
            wait_for(lambda: health(running)["running"] == 1)
            with silent_request(running, user("Hello.")):
                wait_for(lambda: health(running)["waiting"] == 1)
            wait_for(lambda: health(running)["waiting"] == 0)
            assert health(running)["running"] == 1
            assert first.result()
            assert running.batches == [1]

    def test_sigterm_while_streaming(self, tmp_path):
        """It and a request that waits are answered, nobody else is, and the exit code is 0."""
        with serving_process(tmp_path) as (process, client, errors):
            usage = {"include_usage": True}
            stream = iter(ask(client, max_tokens=400, stream=True, stream_options=usage))
            events = [next(stream), next(stream)]
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(text, client, max_tokens=2)
                health = f"{str(client.base_url).removesuffix('v1/')}health"
                wait_for(lambda: httpx2.get(health).json()["waiting"] == 1)
                os.kill(process.pid, signal.SIGTERM)
                wait_for(lambda: "stopping: requests may end within 30 s" in errors.read_text())
                wait_for(lambda: refuses(client))
                events += stream
                assert events[-1].usage.completion_tokens == 400
                assert waiting.result()
            process.join(20)
            assert process.exitcode == 0
        assert errors.read_text().splitlines()[-1] == "stopped"

    def test_a_reply_that_takes_longer_than_a_stop(self, tmp_path):
        arguments = ["--stop-timeout", "1"]
        with serving_process(tmp_path, *arguments) as (process, client, errors):
            stream = iter(ask(client, max_tokens=10**6, stream=True))
            next(stream)
            os.kill(process.pid, signal.SIGTERM)
            process.join(20)
            assert process.exitcode == 0
            with pytest.raises((openai.APIError, httpx2.RemoteProtocolError)):
                list(stream)
        assert "Traceback" not in errors.read_text()


@contextmanager
def silent_request(server, *messages, **settings):
    """A request whose client goes at the end of the block, and does not wait for an answer."""
    body = json.dumps({"model": BASE, "messages": messages, **settings}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        yield


@contextmanager
def serving_process(tmp_path, *arguments):
    """A process of ``vlft serve``, a client of it, and what it writes."""
    errors = tmp_path / "stderr"
    given = ["--model", str(SIGLIP.folder), "--device", "cpu", "--port", "0", *arguments]
    process = start(["serve", *given], errors)
    address = re.compile(r"http://127\.0\.0\.1:\d+/v1")
    try:
        wait_for(lambda: errors.exists() and address.search(errors.read_text()), 90)
        url = address.search(errors.read_text())[0]
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        wait_for(lambda: not refuses(client))
        yield process, client, errors
    finally:
        process.kill()
        process.join()


def refuses(client):
    with suppress(openai.APIConnectionError):
        client.models.list()
        return False
    return True


class FakeJob:
    """What the engine knows of a job."""

    def __init__(self, name, key="one"):
        self.name, self.key = name, key
        self.cancelled = self.alone = False
        self.tokens = 0
        self.left = []

    def leave(self, error=None):
        self.left.append(error)


class TestEngine:
    def run(self, jobs, answer, batch_size=4):
        """The batches, by name, in which an engine answers jobs that wait."""
        batches = []

        def noted(batch):
            batches.append([job.name for job in batch])
            answer(batch)

        async def work():
            engine = Engine(noted, batch_size, 100)
            for job in jobs:
                engine.put(job)
            task = asyncio.create_task(engine.run())
            async with asyncio.timeout(10):
                while not all(job.left for job in jobs):
                    await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(work())
        return batches

    def test_those_alike_together_the_oldest_first(self):
        jobs = [FakeJob(n, key) for n, key in enumerate("aabababbbb")]
        made = self.run(jobs, lambda batch: None)
        assert made == [[0, 1, 3, 5], [2, 4, 6, 7], [8, 9]]
        assert [job.left for job in jobs] == [[None]] * 10

    def test_an_error_is_that_of_one(self, capfd):
        """The others of its batch are answered; those with half a reply are not begun again."""
        jobs = [FakeJob(name) for name in ("good", "bad", "begun")]

        def answer(batch):
            for job in batch:
                if job.name == "begun":
                    job.tokens = 3
            if any(job.name == "bad" for job in batch):
                raise DataError("no such image")

        assert self.run(jobs, answer) == [["good", "bad", "begun"], ["good"], ["bad"]]
        assert [[str(error) for error in job.left] for job in jobs] == [
            ["None"],
            ["no such image"],
            ["no such image"],
        ]


def memory():
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat(server, client, request):
    """``--requests 500`` asks more often."""

    def ask_often(count):
        for number in range(count):
            image = image_url((FIRST, SECOND)[number % 2])
            model = (BASE, "one", "second")[number % 3]
            list(ask(client, user(f"{number}", image), model=model, max_tokens=2, stream=True))

    ask_often(12)
    before = memory()
    ask_often(request.config.getoption("--requests"))
    grown = memory() - before
    print(f"grown by {grown / 2**20:.1f} MiB")
    assert grown < 16 * 2**20
    assert not list(Path(tempfile.gettempdir()).glob("vlft-serve-*/*"))


def test_the_page_of_docs(server, tmp_path, monkeypatch):
    """Its Python and its curl, sent to this server."""
    page = (Path(__file__).parents[1] / "docs/serve.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (30, 30)).save("digit.png")
    assert not [name for name in KNOWN if f"`{name}`" not in page and f"`{name}." not in page]
    code = re.search(r"```py\n(.*?)```", page, re.DOTALL)[1]
    code = code.replace("http://127.0.0.1:8000", server.url).replace("tiny-vl", BASE)
    exec(compile(code, "serve.md", "exec"), {"print": lambda text: Path("out").write_text(text)})
    assert Path("out").read_text()
    body = re.search(r"-d '(.*?)'", page)[1].replace("tiny-vl", BASE)
    assert post(server, body.encode()).status_code == 200
