"""``vlft serve``, asked by OpenAI's own client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from conftest import GOLDEN, JANUS, OCR, SIGLIP, VL2_NOAUX, write_jsonl
from served import image_url, make_adapter, serving, user, wait_for

import vlft
from vlft.config import ServeConfig

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
        names = {BASE: None, "one": adapters[0], "second": adapters[1]}
        expected = {
            name: inferred(tmp_path, rows, model=str(SIGLIP.folder), ckpt_dir=adapter)[0]
            for name, adapter in names.items()
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
            ask(client, user("1 2 3 4 " * 50_000))
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
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (2000, 1001)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


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
