"""Who may ask: the key, and for a server without one only programs of this machine.

A page of a stranger, open in a browser of this machine, could send requests to it as well. Those
under another name than the server's, and those that are not JSON, are refused; a browser asks
before it sends JSON to another site, and is not answered.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vlft.serving.problems import ApiError
from vlft.serving.shapes import Json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/health")


class Guard:
    """Answers requests that may not be made, and lets others through.

    Args:
        app: what answers them.
        key: that they must have; empty for none.
        host: the address that the server listens on.
    """

    def __init__(self, app: ASGIApp, key: str, host: str) -> None:
        self._app, self._key = app, key
        self._hosts = {*LOCAL, host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers or passes on."""
        error = self._problem(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await Json(error.body, error.status)(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._key:
            return None if scope["path"] in OPEN else self._wrong_key(headers)
        if _host(headers.get(b"host", "")) not in self._hosts:
            found = f"the host {headers.get(b'host', '')[:100]!r} is not this server"
            return ApiError(403, found, code="wrong_host", hint="ask for 127.0.0.1")
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            found = f"found content-type {kind!r}, application/json is needed"
            return ApiError(415, found, code="wrong_content_type")
        return None

    def _wrong_key(self, headers: dict[Any, str]) -> ApiError | None:
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(
            key.strip().encode("latin-1"), self._key.encode("latin-1")
        ):
            return None
        hint = "send the header Authorization: Bearer KEY"
        found = "the key is not right" if key else "a key is needed"
        return ApiError(401, found, code="invalid_api_key", hint=hint)


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
