"""An HTTP client that connects to public addresses alone, and gives up at a deadline.

A name is resolved here, and the connection is made to the very address that was looked at: a name
that resolves to another one a moment later changes nothing. Each redirect is a new request, so its
address is looked at too.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import httpcore2
import httpx2

from vlft.errors import DataError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable, Iterator

# IPv6 addresses of IPv4 hosts behind a translator.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
USER_AGENT = "vlft"
# When the request of this thread is to be over, as time.monotonic() counts.
deadline: ContextVar[float] = ContextVar("deadline")


def make_client(*, allow_private: bool, silence: float, redirects: int) -> httpx2.Client:
    """A client for GET.

    Args:
        allow_private: whether loopback, private and link-local addresses are connected to.
        silence: most seconds without a byte.
        redirects: most redirects in a row.
    """
    return httpx2.Client(
        transport=_Transport(allow_private),
        timeout=silence,
        follow_redirects=True,
        max_redirects=redirects,
        headers={"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
    )


def is_public(address: str) -> bool:
    """Whether an IP address can be reached by everybody; one within an IPv6 address counts."""
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        teredo = ip.teredo[1] if ip.teredo else None
        translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or teredo or translated or ip
    return bool(ip.is_global and not ip.is_multicast)


def _time_left(timeout: float | None) -> float:
    left = deadline.get() - time.monotonic()
    if left <= 0:
        raise httpcore2.ReadTimeout("the deadline has passed")
    return left if timeout is None else min(timeout, left)


class _Stream(httpcore2.NetworkStream):
    """A connection, none of whose calls outlasts the deadline."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _time_left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _time_left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.NetworkStream:
        left = _time_left(timeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore2.SyncBackend):
    """Resolves a name, and connects to the first of its allowed addresses that answers."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        failed: Exception | None = None
        for address in self._addresses(host, port):
            try:
                return _Stream(
                    super().connect_tcp(
                        address, port, _time_left(timeout), local_address, socket_options
                    )
                )
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failed = error
        raise failed or httpcore2.ConnectError(f"{host} has no address")

    def _addresses(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno == socket.EAI_AGAIN:
                raise httpcore2.ConnectError(f"{host} cannot be looked up") from error
            raise DataError(f"no host {host}", hint="check the address") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        allowed = [a for a in addresses if self._allow_private or is_public(a)]
        if not allowed:
            name = host if host in addresses else f"{host} is {addresses[0]}"
            raise DataError(
                f"{name}, an address that is not public",
                hint="download the image yourself; if you trust what the data names, add "
                "--allow-private-urls",
            )
        return allowed


class _Body(httpx2.SyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


class _Transport(httpx2.BaseTransport):
    """Sends requests of httpx through connections of the backend above; no proxy is used."""

    def __init__(self, allow_private: bool) -> None:
        self._pool = httpcore2.ConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            max_connections=None,
            network_backend=_Backend(allow_private),
        )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = httpcore2.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        answer = self._pool.handle_request(
            httpcore2.Request(
                method=request.method,
                url=url,
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(answer.status, headers=answer.headers, stream=_Body(answer.stream))

    def close(self) -> None:
        self._pool.close()
