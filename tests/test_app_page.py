"""The page of ``vlft app`` and reports, in Chromium."""

from __future__ import annotations

import base64
import json
import re

import httpx2
import pytest
from browser import CHROMIUM, browser
from conftest import GOLDEN, SIGLIP, write_jsonl
from served import image_url, make_adapter, serving

from vlft.config import CheckConfig, ServeConfig
from vlft.data.layouts.place import COMMON_TAG
from vlft.data.ocr_blocks import BOX, TYPE
from vlft.evaluation.boxes import DETECTION
from vlft.report.page import NAME
from vlft.report.runs import write_run_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

EVIL = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title='evil'\">"
BASE = SIGLIP.checkpoint


@pytest.fixture(scope="module")
def page():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    adapter = make_adapter(SIGLIP.folder, tmp_path_factory.mktemp("a") / "tuned", 1)
    config = ServeConfig(ckpt_dir=(str(adapter),), device="cpu", max_new_tokens=6)
    with serving(config, page=True) as running:
        yield running


@pytest.fixture
def app(page, server):
    """The page, freshly loaded."""
    page.resize(1280, 800)
    page.open(server.url)
    page.wait("document.querySelectorAll('#models input').length === 2")
    page.errors.clear()
    return page


def drop_image(app, kind="drop", name="photo_a.jpg"):
    """Drops a file on the page, or pastes it."""
    data = base64.b64encode((GOLDEN / "images" / name).read_bytes()).decode()
    before = app.run("chosen.length")
    app.run(
        f"""(() => {{
        const bytes = Uint8Array.from(atob({data!r}), (c) => c.charCodeAt(0));
        const held = new DataTransfer();
        held.items.add(new File([bytes], {name!r}, {{ type: "image/jpeg" }}));
        document.dispatchEvent({kind!r} === "drop"
            ? new DragEvent("drop", {{ dataTransfer: held, bubbles: true, cancelable: true }})
            : new ClipboardEvent("paste", {{ clipboardData: held, bubbles: true }}));
        }})()"""
    )
    app.wait(f"chosen.length === {before + 1}")


def ask(app, question):
    app.run(f"byId('question').value = {json.dumps(question)}; send(); 0")
    app.wait("!running && document.querySelector('.reply')")


def replies(app):
    return app.run("[...document.querySelectorAll('.reply .text')].map((e) => e.textContent)")


def in_place_of_the_model(app, *pieces):
    """Lets the server answer with a text of ours, in pieces."""
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}]
    chunks += [{"choices": [], "usage": usage}]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    app.run(f"window.fetch = async () => new Response({json.dumps(body)}); 0")


def test_elements(app):
    assert app.run("document.title") == "vlft"
    assert app.run("[...document.querySelectorAll('#models label')].map((e) => e.textContent)") == [
        BASE,
        "tuned",
    ]
    assert app.run("document.activeElement.id") == "question"
    for name in ("Ask", "Add images", "New dialogue"):
        has_name = f"(button) => button.textContent === '{name}'"
        assert app.run(f"[...document.querySelectorAll('button')].some({has_name})")
    assert app.settle() == []


def test_nothing_is_loaded_from_elsewhere(server):
    given = httpx2.get(server.url)
    text = given.text
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    assert "innerHTML" not in text
    assert "insertAdjacentHTML" not in text
    policy = given.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_conversation_with_an_image(app, server, tmp_path):
    """Both models answer beside each other, as to other clients, and the next turn knows them."""
    drop_image(app)
    drop_image(app, "paste", "chart.png")
    app.run("document.querySelectorAll('#chosen button')[1].click()")
    ask(app, "What is it?")
    client = server.client()
    parts = [
        {
            "type": "image_url",
            "image_url": {"url": image_url("photo_a.jpg").replace("jpg", "jpeg")},
        },
        {"type": "text", "text": "What is it?"},
    ]
    messages = [{"role": "user", "content": parts}]

    def reply(model, messages):
        made = client.chat.completions.create(model=model, messages=messages)
        return made.choices[0].message.content

    first = [reply(model, messages) for model in (BASE, "tuned")]
    assert replies(app) == first
    assert first[0] != first[1]
    assert app.run("document.querySelectorAll('.asked img').length") == 1
    assert "6 tokens" in app.run("document.querySelector('.foot span').textContent")
    ask(app, "And now?")
    again = [
        reply(model, [*messages, {"role": "assistant", "content": said},
                      {"role": "user", "content": "And now?"}])
        for model, said in zip((BASE, "tuned"), first, strict=True)
    ]  # fmt: skip
    assert replies(app) == first + again
    assert app.settle() == []
    record = app.run("recordOf('tuned', turns[1])")
    check_record(record, tmp_path)
    app.run("byId('new').click()")
    assert replies(app) == []


def check_record(line, tmp_path):
    """A copied line is a record that vlft sft reads."""
    from vlft.cli.check import run_check

    found = json.loads(line)
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"] * 2
    assert found["messages"][0]["content"] == f"{COMMON_TAG}What is it?"
    assert len(found["images"]) == 1
    file = tmp_path / "copied.jsonl"
    file.write_text(line + "\n", "utf-8")
    run_check(CheckConfig(dataset=(str(file),), model=str(SIGLIP.folder)))


def test_a_reply_can_be_corrected_and_copied(app):
    in_place_of_the_model(app, "It is ", "one.")
    app.run("document.querySelectorAll('#models input')[1].click()")
    ask(app, "Which?")
    app.run(
        "Object.defineProperty(navigator, 'clipboard',"
        " { value: { writeText: (text) => { window.got = text; } } }); 0"
    )
    app.run("document.querySelector('.text').textContent = 'It is two.'; 0")
    app.run("document.querySelector('.foot button').click()")
    app.wait("window.got")
    messages = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "It is two."},
    ]
    assert json.loads(app.run("window.got")) == {"messages": messages}


def test_scripts_in_texts_do_not_run(app):
    in_place_of_the_model(app, EVIL, f"<|ref|>{EVIL}<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>")
    drop_image(app)
    ask(app, EVIL)
    assert EVIL in replies(app)[0]
    assert app.run("document.querySelector('.asked p').textContent") == EVIL
    assert app.run("document.querySelector('.box span').textContent") == EVIL
    assert app.run("document.querySelectorAll('main script, img[src=x]').length") == 0
    assert app.settle() == []
    assert app.run("document.title") == "vlft"


CASES = [
    "<|ref|>the cat<|/ref|><|det|>[[125, 125, 500, 874]]<|/det|>",
    "<|ref|>two<|/ref|>\n<|det|>[[1, 2, 3, 4], [5.5, 6, 7, 8]]<|/det|> <|det|>[[0,0,9,9]]<|/det|>",
    "<|det|>text [125, 125, 500, 874]<|/det|>",
    "<|det|>[[-5, 0, 2000, 3]]<|/det|> <|det|>[[1, 2]]<|/det|> <|det|>[[1,2,3,4",
    "plain",
]


@pytest.mark.parametrize("reply", CASES)
def test_boxes_are_those_of_reports(app, reply):
    expected = [
        [tag, name or (kind[1] if (kind := TYPE.match(inside)) else ""), *map(float, box.groups())]
        for tag, (name, inside) in enumerate(DETECTION.findall(reply))
        for box in BOX.finditer(inside)
    ]
    assert app.run(f"boxesOf({json.dumps(reply)})") == expected


def test_boxes_lie_on_the_image(app):
    in_place_of_the_model(app, "<|ref|>cat<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|>")
    drop_image(app)
    ask(app, "Where?")
    app.wait("document.querySelector('figure img').complete")
    box, image = (
        app.run(f"(({{x, y, width, height}}) => [x, y, width, height])"
                f"(document.querySelector('{name}').getBoundingClientRect())")
        for name in (".box", "figure img")
    )  # fmt: skip
    assert box[:2] == pytest.approx(image[:2], abs=1)
    assert box[2] == pytest.approx(image[2] * 500 / 999, abs=1)
    assert box[3] == pytest.approx(image[3], abs=1)


def test_a_wrong_request_is_said(app):
    app.run("byId('temperature').value = '-1'; 0")
    ask(app, "Hello.")
    assert app.run("document.querySelector('.foot .wrong').textContent").startswith(
        "temperature: found -1, a number from 0 to 100 is allowed"
    )
    app.run("byId('temperature').value = ''; 0")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_page(app, width):
    app.resize(width, 800)
    in_place_of_the_model(app, "word " * 60, "x" * 300)
    drop_image(app)
    ask(app, "y" * 300)
    assert app.run("document.documentElement.scrollWidth") <= width
    cards = app.run(
        "[...document.querySelectorAll('.reply')].map(e => e.getBoundingClientRect().x)"
    )
    assert (cards[0] == cards[1]) == (width == 390)


def test_a_key_is_asked_for(page):
    config = ServeConfig(model=str(SIGLIP.folder), device="cpu", api_key="right")
    with serving(config, page=True) as running:
        page.open(running.url)
        page.wait("!byId('locked').hidden")
        page.run("byId('key').value = 'wrong'; byId('unlock').click()")
        page.wait("byId('refused').textContent")
        assert page.run("byId('form').hidden")
        page.run("byId('key').value = 'right'; byId('unlock').click()")
        page.wait("document.querySelectorAll('#models input').length === 1")
        assert page.run("byId('locked').hidden")


@pytest.fixture
def report(tmp_path):
    """The report of a run whose data would like to run scripts."""
    run = tmp_path / "v0"
    (run / "infer").mkdir(parents=True)
    (run / "run_config.json").write_text(json.dumps({"model": None, "output_dir": EVIL}))
    lines = [{"step": n, "loss": 3.0 / n, "learning_rate": 1e-3 / n} for n in (1, 2, 3)]
    write_jsonl(run / "metrics.jsonl", [*lines, {"step": 3, "val_loss": 1.5}])
    boxed = f"<|ref|>{EVIL}<|/ref|><|det|>[[1, 2, 300, 400]]<|/det|>"
    photo = str(GOLDEN / "images" / "photo_a.jpg")
    row = {"query": f"<image>{EVIL}", "response": boxed, "label": EVIL, "images": [photo]}
    write_jsonl(run / "infer" / "checkpoint-3-val.jsonl", [row])
    write_run_report(run)
    return run / NAME


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report(page, report, width):
    """Text of data is text, and the page is no wider than the window."""
    page.resize(width, 800)
    page.errors.clear()
    page.open(report.as_uri())
    assert "v0" in page.run("document.title")
    assert page.run("document.querySelectorAll('.charts svg polyline').length") >= 2
    assert page.run("document.querySelectorAll('.card').length") == 1
    assert page.run("document.querySelector('.image img').naturalWidth") > 0
    assert page.run("document.querySelectorAll('.image rect').length") == 1
    assert page.run("document.querySelectorAll('script, img[src=x]').length") == 0
    assert page.run("document.documentElement.scrollWidth") <= width
    assert EVIL in page.run("document.body.textContent")
    assert page.settle() == []
