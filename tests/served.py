"""A server of ``vlft serve`` in a thread of this process, and adapters for it to serve."""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai
import torch
from conftest import GOLDEN

from vlft.checkpoints.adapter import save_adapter
from vlft.checkpoints.load import load_model
from vlft.checkpoints.locate import describe
from vlft.checkpoints.placement import Placement
from vlft.serving.api import make_api
from vlft.serving.models import Models, find_models, load_models
from vlft.serving.run import bind
from vlft.serving.server import Server
from vlft.training.lora import LoraOptions, add_lora

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vlft.config import ServeConfig


@dataclass
class Running:
    """A server; ``batches`` has the size of each batch so far, ``jobs`` the last requests."""

    url: str
    models: Models
    batches: list[int]
    jobs: deque[Any]

    def client(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        given = {"max_retries": 0, "timeout": 60, **settings}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **given)


@contextmanager
def serving(config: ServeConfig, *, page: bool = False) -> Iterator[Running]:
    """Runs a server in a thread, which stops when the block ends, so that no port stays taken."""
    models = load_models(config, find_models(config))
    batches: list[int] = []
    jobs: deque[Any] = deque(maxlen=20)
    answer = models.answer

    def counted(given):
        batches.append(len(given))
        jobs.extend(given)
        answer(given)

    models.answer = counted  # type: ignore[method-assign]
    listener = bind(config.host, 0)
    server = Server(make_api(config, models, page=page), config.stop_timeout)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", models, batches, jobs)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def wait_for(condition, seconds: float = 20) -> None:
    """Returns once a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.01)


def make_adapter(checkpoint: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter that does something, as ``vlft sft`` leaves its files."""
    base = describe(checkpoint)
    model = load_model(base, Placement(torch.device("cpu"), torch.float32))
    torch.manual_seed(seed)
    tuned = add_lora(model, base.family, LoraOptions(**options))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape)
            parameter.data = parameter.data + 0.2 * noise * ("lora_B" in name)
    folder.mkdir(parents=True)
    tuned.peft_config["default"].base_model_name_or_path = str(checkpoint)
    save_adapter(tuned, folder, base=base.weights_digest)
    return folder


def image_url(name: str) -> str:
    """An image of the golden cases as a data: URI."""
    data = (GOLDEN / "images" / name).read_bytes()
    return f"data:image/{name.rpartition('.')[2]};base64,{base64.b64encode(data).decode()}"


def user(text: str, *images: str) -> dict[str, Any]:
    """A message of the user, images first."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
