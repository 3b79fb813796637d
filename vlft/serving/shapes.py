"""Replies in the form of OpenAI's chat completions."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from vlft.serving.jobs import Job
    from vlft.serving.models import Models, Served
    from vlft.serving.problems import ApiError

DONE = "[DONE]"


class Json(JSONResponse):
    """JSON in ASCII: half of a surrogate pair, which a client can send, has no UTF-8."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content).encode()


@dataclass(frozen=True)
class Completion:
    """The answer to a request."""

    job: Job
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str) -> dict[str, Any]:
        """A reply that has ended."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage}

    async def stream(self, pieces: AsyncIterator[str], *, usage: bool) -> AsyncIterator[str]:
        """The events of a reply that grows; the last one but the mark of the end has the usage."""
        yield self._event({"role": "assistant", "content": ""}, None, usage)
        async for piece in pieces:
            yield self._event({"content": piece}, None, usage)
        yield self._event({}, self._finish, usage)
        if usage:
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": self._usage})
        yield f"data: {DONE}\n\n"

    def _event(self, delta: dict[str, Any], finish: str | None, usage: bool) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        head = self._head("chat.completion.chunk")
        return event({**head, "choices": [choice], **({"usage": None} if usage else {})})

    def _head(self, kind: str) -> dict[str, Any]:
        model = self.job.served.id
        return {"id": self.id, "object": kind, "created": self.created, "model": model}

    @property
    def _finish(self) -> str | None:
        return self.job.ended.finish if self.job.ended else None

    @property
    def _usage(self) -> dict[str, int]:
        prompt, reply = len(self.job.prompt), self.job.ended.tokens if self.job.ended else 0
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        return dict(zip(names, (prompt, reply, prompt + reply), strict=True))


def event(value: dict[str, Any]) -> str:
    """A value as a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def error_events(error: ApiError) -> str:
    """The end of a stream that cannot go on."""
    return event(error.body) + f"data: {DONE}\n\n"


def model_list(models: Models, created: int) -> dict[str, Any]:
    """What ``/v1/models`` lists."""
    return {
        "object": "list",
        "data": [model_row(one, models, created) for one in models.served.values()],
    }


def model_row(served: Served, models: Models, created: int) -> dict[str, Any]:
    """A model; ``parent`` names the base of an adapter."""
    base = next(iter(models.served)) if served.adapter else None
    head = {"id": served.id, "object": "model", "created": created, "owned_by": "vlft"}
    return {**head, "parent": base}
