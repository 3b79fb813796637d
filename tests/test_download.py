"""Images at web addresses, from a server on this machine that misbehaves in every way."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from vlft.cli.cache import run_cache
from vlft.config import CacheConfig
from vlft.data import web
from vlft.data.conversation import ImageRef
from vlft.data.dataset import load_dataset
from vlft.data.download import Limits, download_images
from vlft.data.image_cache import path_of, size_of_cache
from vlft.data.options import DataOptions, Reading
from vlft.errors import DataError
from vlft.files import cache_folder
from vlft.inference.columns import Columns

QUICK = Limits(size=200_000, silence=0.3, total=0.5, attempts=3, pause=0.01, longest_pause=0.2)


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the first part of the path; counts the requests of each path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        number = server.counts.update([self.path]) or server.counts[self.path]
        server.hosts.append(self.headers["Host"])
        getattr(self, self.path.split("/")[1].split("?")[0])(number)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def image(self, _: int) -> None:
        self.answer(200, png())

    def flaky(self, number: int) -> None:
        if number == 1:
            self.answer(503, b"")
        elif number == 2:
            self.answer(429, b"", Retry_After="0")
        else:
            self.answer(200, png())

    def failing(self, _: int) -> None:
        self.answer(500, b"oops")

    def gone(self, _: int) -> None:
        self.answer(404, b"<html>")

    def html(self, _: int) -> None:
        self.answer(200, b"<!DOCTYPE html><p>log in")

    def empty(self, _: int) -> None:
        self.answer(200, b"")

    def stated(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(10**10))
        self.end_headers()

    def endless(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.drip(itertools.repeat(bytes(50_000)), 0)

    def slow(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.drip(itertools.repeat(b"x"), 0.1)

    def slow_head(self, _: int) -> None:
        self.drip([b"HTTP/1.1 200 OK\r\n", *itertools.repeat(b"X-A: b\r\n", 100)], 0.1)

    def mute(self, _: int) -> None:
        self.server.over.wait(20)

    def broken(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(png()[:40])
        self.close_connection = True

    def redirect(self, _: int) -> None:
        self.answer(302, b"", Location=self.path.partition("?")[2])

    def circle(self, _: int) -> None:
        self.answer(302, b"", Location=self.path)

    def drip(self, parts, pause: float) -> None:
        self.close_connection = True
        try:
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()
                if self.server.over.wait(pause):
                    return
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.counts, server.hosts, server.over = Counter(), [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fetch(*addresses: str, allow_private: bool = True) -> list[str | Path]:
    """What becomes of each address: the file, or the message."""
    refs = [ImageRef(path_of(a), a, address=a) for a in addresses]
    failed = download_images(refs, allow_private=allow_private, limits=QUICK)
    return [failed[r.path].message if r.path in failed else r.path for r in refs]


def kept() -> list[Path]:
    return [path for path in cache_folder("images").rglob("*") if path.is_file()]


class TestAnswers:
    def test_an_image_is_downloaded_once(self, server):
        addresses = [f"{server.url}/image/{number}" for number in range(40)]
        paths = fetch(*addresses)
        assert {path.read_bytes() for path in paths} == {png()}
        assert set(server.counts.values()) == {1}
        assert len(server.counts) == 40
        # The bytes once, and a link to them per address.
        assert len({path.resolve() for path in paths}) == 1
        assert len([path for path in kept() if not path.is_symlink()]) == 1
        fetch(*addresses)
        assert set(server.counts.values()) == {1}

    def test_local_files_are_left_alone(self):
        assert download_images([ImageRef(Path("a.png"), "a.png")], allow_private=False) == {}

    @pytest.mark.parametrize(
        ("path", "found", "requests"),
        [
            ("gone", "HTTP 404 Not Found", 1),
            ("failing", "cannot be downloaded, 3 times: HTTP 500 Internal Server Error", 3),
            ("broken", "cannot be downloaded, 3 times: peer closed connection", 3),
            ("slow", "cannot be downloaded, 3 times: the server is too slow", 3),
            ("slow_head", "cannot be downloaded, 3 times: the server is too slow", 3),
            ("mute", "cannot be downloaded, 3 times: the server is too slow", 3),
            ("stated", "9,536.7 MiB, at most 0.2 are read", 1),
            ("endless", "0.2 MiB, at most 0.2 are read", 1),
            ("html", "the address gives an HTML page, so a download failed", 1),
            ("empty", "the address gives an empty file", 1),
            ("circle", "more than 5 redirects", 6),
        ],
    )
    def test_what_is_said_and_how_often_it_is_tried(self, server, path, found, requests):
        started = time.monotonic()
        [message] = fetch(f"{server.url}/{path}")
        assert str(message).startswith(found)
        assert server.counts[f"/{path}"] == requests
        assert time.monotonic() - started < 3 * QUICK.total + 2
        assert kept() == []

    def test_failures_and_then_success(self, server):
        [path] = fetch(f"{server.url}/flaky")
        assert path.read_bytes() == png()
        assert server.counts["/flaky"] == 3

    def test_one_that_fails_does_not_stop_the_others(self, server):
        names = [f"{'gone' if number % 3 else 'image'}/{number}" for number in range(9)]
        found = fetch(*(f"{server.url}/{name}" for name in names))
        assert [isinstance(item, Path) for item in found] == [n.startswith("image") for n in names]

    def test_no_such_host_and_no_server(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        there, host = fetch(f"http://127.0.0.1:{port}/a", "http://no-such-host.invalid/a.png")
        assert there.startswith("cannot be downloaded, 3 times: ")
        assert host.startswith(("no host no-such-host.invalid", "cannot be downloaded, 3 times"))

    def test_a_cache_that_cannot_be_written(self, server, tmp_path):
        (tmp_path / "cache").write_text("a file in the way")
        assert fetch(f"{server.url}/image") == ["cannot be kept (Not a directory)"]


@pytest.mark.only_siglip
class TestData:
    """Records that name addresses, through the same functions as a run's."""

    @pytest.fixture(autouse=True)
    def _inside(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def load(self, processor, *images: str, **options: object):
        rows = [{"query": "<image>What?", "response": "x", "images": [name]} for name in images]
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        known = DataOptions(Reading(processor.chat.image_tag), **options)
        return load_dataset(["a.jsonl"], processor.encoder, known)

    def test_of_a_data_file(self, server, processor, capfd):
        address = f"HTTP://{server.url.removeprefix('http://')}/image/1"
        data = self.load(processor, address, allow_private_urls=True)
        [image] = data[0].images
        assert image.digest == hashlib.sha256(png()).hexdigest()
        assert len(processor.pixel_values([image], verify=True)) == 1
        [row] = [Columns(data.conversations, "").row(item) for item in data.conversations]
        assert row["images"] == [address]
        run_cache(CacheConfig(action="info"))
        assert "images                                1 file " in capfd.readouterr().out
        run_cache(CacheConfig(action="clear"))
        assert size_of_cache("images") == (0, 0)
        assert not Path(image.path).exists()

    def test_the_message_has_record_and_address(self, server, processor):
        address = f"{server.url}/gone"
        with pytest.raises(DataError) as error:
            self.load(processor, address, allow_private_urls=True)
        assert str(error.value).startswith(f"a.jsonl:1: {address}: HTTP 404 Not Found\n hint: ")
        with pytest.raises(DataError, match="an address that is not public"):
            self.load(processor, address)

    def test_through_python_only_public_addresses(self, server, processor):
        row = {"query": "<image>What?", "images": [f"{server.url}/image"]}
        with pytest.raises(DataError, match="an address that is not public"):
            processor.encode(row)
        assert not server.counts

    def test_confined(self, server, processor, tmp_path):
        """Files of another folder are refused, links to it too; what was downloaded is read."""
        inside, outside = tmp_path / "in", tmp_path / "in-other"
        for folder in (inside, outside):
            folder.mkdir()
            (folder / "a.png").write_bytes(png())
        (inside / "link.png").symlink_to(outside / "a.png")
        (outside / "back.png").symlink_to(inside / "a.png")
        options = {"confine_images": Path("in"), "allow_private_urls": True}
        allowed = ["in/a.png", "in-other/../in/a.png", "in-other/back.png", f"{server.url}/image"]
        assert len(self.load(processor, *allowed, **options)) == 4
        refused = ["in-other/a.png", "in/link.png", "in/../in-other/a.png", "/etc/passwd", "no.png"]
        for name in refused:
            with pytest.raises(DataError, match=r"a\.jsonl:1: .*: lies outside of in\n hint: copy"):
                self.load(processor, name, **options)

    @pytest.mark.parametrize(
        "address", ["s3://bucket/a.png", "oss://b/a.png", "GS://b/a.png", "cluster:s3://b/a.png"]
    )
    def test_other_addresses_are_refused_as_they_were_written(self, processor, address):
        with pytest.raises(DataError) as error:
            self.load(processor, address)
        assert str(error.value).startswith(f"a.jsonl:1: found {address!r} as an image; paths and")


class TestAddresses:
    @pytest.mark.parametrize("address", [
        "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0",
        "fd00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::",
        "64:ff9b::a9fe:a9fe",
    ])  # fmt: skip
    def test_not_public(self, address):
        assert not web.is_public(address)

    @pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1"])
    def test_public(self, address):
        assert web.is_public(address)

    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1"]
    )
    def test_private_hosts_are_refused_however_written(self, server, host):
        [message] = fetch(f"http://{host}:{server.server_port}/image", allow_private=False)
        assert not isinstance(message, Path)
        assert not server.counts

    def test_the_message(self, server):
        refs = [ImageRef(path_of(server.url), "a", address=f"{server.url}/image")]
        [error] = download_images(refs, allow_private=False, limits=QUICK).values()
        assert str(error) == (
            "127.0.0.1, an address that is not public\n hint: download the image yourself; if you "
            "trust what the data names, add --allow-private-urls"
        )

    @pytest.mark.parametrize("target", ["127.0.0.2", "localhost.localdomain.test", "[::1]"])
    def test_a_redirect_to_a_private_address(self, server, monkeypatch, target):
        """The server counts as public, and sends on to others, which are not."""
        monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")
        resolve(monkeypatch, {"localhost.localdomain.test": ["127.0.0.2"]})
        there = f"http://{target}:{server.server_port}/image"
        [message] = fetch(f"{server.url}/redirect?{there}", allow_private=False)
        assert "an address that is not public" in message
        assert "/image" not in server.counts
        [path] = fetch(f"{server.url}/redirect?{server.url}/image", allow_private=False)
        assert path.read_bytes() == png()

    @pytest.mark.parametrize("there", ["file:///etc/passwd", "ftp://127.0.0.1/a.png"])
    def test_a_redirect_to_what_is_no_web_address(self, server, there):
        [message] = fetch(f"{server.url}/redirect?{there}")
        assert message == "leads to what is no web address"

    def test_the_address_that_was_looked_at_is_connected_to(self, server, monkeypatch):
        """A name that becomes private after it was looked at does not lead there."""
        monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")
        asked = resolve(monkeypatch, {"images.test": ["127.0.0.1"]}, afterwards=["127.0.0.2"])
        [path] = fetch(f"http://images.test:{server.server_port}/image", allow_private=False)
        assert path.read_bytes() == png()
        assert asked == ["images.test"]
        assert server.hosts == [f"images.test:{server.server_port}"]

    def test_of_several_addresses_only_the_public_are_used(self, server, monkeypatch):
        monkeypatch.setattr(web, "is_public", lambda address: address == "127.0.0.1")
        resolve(monkeypatch, {"images.test": ["10.0.0.1", "127.0.0.1"]})
        [path] = fetch(f"http://images.test:{server.server_port}/image", allow_private=False)
        assert path.read_bytes() == png()


def resolve(monkeypatch, hosts: dict[str, list[str]], afterwards: list[str] | None = None):
    """Lets names of hosts resolve to these addresses, and later to others; returns those asked."""
    asked, real = [], socket.getaddrinfo

    def getaddrinfo(host, port, *rest, **options):
        if host not in hosts:
            return real(host, port, *rest, **options)
        addresses = afterwards if afterwards and host in asked else hosts[host]
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked
