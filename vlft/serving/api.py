"""The routes: chat completions, models, health, and the page of ``vlft app``."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from vlft.serving.engine import Engine
from vlft.serving.guard import Guard
from vlft.serving.jobs import Job
from vlft.serving.page import HEADERS, read_page
from vlft.serving.problems import ApiError, as_answer, report
from vlft.serving.prompts import ImageLimits, encode_messages
from vlft.serving.requests import ChatRequest, read_request
from vlft.serving.shapes import Completion, Json, error_events, model_list, model_row

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from vlft.config import ServeConfig
    from vlft.inference.generate import Sampling
    from vlft.serving.models import Models, Served

# Seconds in which the body of a request must be there.
BODY_SECONDS = 120
# A body that is too large is read and forgotten up to so many times the limit: a client that is
# still sending would not see the answer.
DRAINED = 8
MEGABYTE = 10**6


@dataclass(frozen=True)
class Service:
    """What the routes use."""

    models: Models
    engine: Engine
    limits: ImageLimits
    largest: int
    started: int

    def model(self, name: str) -> Served:
        """The model of a name.

        Raises:
            ApiError: there is none.
        """
        if name not in self.models.served:
            known = ", ".join(self.models.served)
            found = f"no model {name[:200]!r}; there are: {known}"
            raise ApiError(404, found, place="model", code="model_not_found")
        return self.models.served[name]

    async def ask(self, request: Request) -> tuple[ChatRequest, Job]:
        """The request that an HTTP request makes, and its job, which waits for its turn.

        Raises:
            ApiError: it cannot be answered.
        """
        with self.engine.place():
            asked = read_request(await _body(request, self.largest))
            served = self.model(asked.model)
            sampling = _sampling(asked, served.sampling)
            with ExitStack() as kept:
                folder = kept.enter_context(
                    tempfile.TemporaryDirectory(prefix="vlft-serve-", ignore_cleanup_errors=True)
                )
                prompt = await asyncio.to_thread(
                    encode_messages, asked.messages, served.processor, Path(folder), self.limits
                )
                most = asked.most or served.sampling.max_new_tokens or 1
                seed = asked.numbers.get("seed", secrets.randbits(62)) % 2**63
                release = kept.pop_all().close
                job = Job(served, prompt, sampling, most, seed, asked.stop, release)
            self.engine.put(job)
        return asked, job

    async def whole(self, job: Job, request: Request) -> Response:
        """The answer once the reply has ended; nothing to a client that has gone."""
        reading = asyncio.ensure_future(_text(job))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=499)
            return Json(Completion(job).whole(reading.result()))
        finally:
            reading.cancel()
            leaving.cancel()
            self.engine.drop(job)


class _Stream(StreamingResponse):
    """The answer as it grows; a client that goes, even before the first event, drops the job."""

    def __init__(self, engine: Engine, job: Job, *, usage: bool) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(job, usage), media_type="text/event-stream", headers=headers)
        self._engine, self._job = engine, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._engine.drop(self._job)


def make_api(config: ServeConfig, models: Models, *, page: bool = False) -> Guard:
    """The application that uvicorn runs; its engine runs from its start to its end."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        engine = Engine(models.answer, config.batch_size, config.max_queue)
        largest = config.max_request_mb * MEGABYTE
        limits = ImageLimits(
            config.max_images, largest, config.max_image_pixels, config.allow_private_urls
        )
        app.state.service = Service(models, engine, limits, largest, int(time.time()))
        answering = asyncio.create_task(engine.run())
        try:
            yield
        finally:
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering

    # Its documentation pages load scripts from the network.
    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_api_route("/v1/chat/completions", _chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", _models, response_model=None)
    app.add_api_route("/v1/models/{name:path}", _model, response_model=None)
    app.add_api_route("/health", _health, response_model=None)
    if page:
        app.add_api_route("/", _page, response_model=None)
    return Guard(app, config.key, config.host)


async def _chat(request: Request) -> Response:
    service: Service = request.app.state.service
    asked, job = await service.ask(request)
    if asked.stream:
        return _Stream(service.engine, job, usage=asked.include_usage)
    return await service.whole(job, request)


async def _models(request: Request) -> Response:
    service: Service = request.app.state.service
    return Json(model_list(service.models, service.started))


async def _model(request: Request, name: str) -> Response:
    service: Service = request.app.state.service
    return Json(model_row(service.model(name), service.models, service.started))


async def _health(request: Request) -> Response:
    engine: Engine = request.app.state.service.engine
    counts = {"waiting": engine.waiting, "running": len(engine.running)}
    return Json({"status": "ok", **counts})


async def _page() -> Response:
    text, policy = read_page()
    return HTMLResponse(text, headers={**HEADERS, "Content-Security-Policy": policy})


async def _answer_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """The answer to a request that led to an error."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail), code="wrong_route")
    if not isinstance(error, ApiError):
        report(error)
    answer = as_answer(error)
    headers = {"Retry-After": "1"} if answer.status == 429 else None
    return Json(answer.body, answer.status, headers)


def _sampling(asked: ChatRequest, default: Sampling) -> Sampling:
    """The settings of the reply; greedy decoding has no use for top_p and top_k."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given: dict[str, Any] = {name: asked.numbers[name] for name in names if name in asked.numbers}
    if given.get("temperature", default.temperature) == 0:
        given |= {"top_p": 1.0, "top_k": 0}
    return replace(default, **given)


async def _body(request: Request, largest: int) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too large, or does not come.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= largest:
                    parts.append(part)
                elif size > DRAINED * largest:
                    break
                else:
                    parts.clear()
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_SECONDS} s") from None
    if size > largest:
        found = f"the body is larger than {largest:,} bytes, which is the most"
        raise ApiError(413, found, code="request_too_large", hint="send smaller images")
    return b"".join(parts)


async def _text(job: Job) -> str:
    return "".join([piece async for piece in job.pieces()])


async def _left(request: Request) -> None:
    """Returns once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(job: Job, usage: bool) -> AsyncIterator[str]:
    try:
        async for text in Completion(job).stream(job.pieces(), usage=usage):
            yield text
    except ApiError as error:
        yield error_events(error)
