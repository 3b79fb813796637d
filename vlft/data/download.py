"""Images at web addresses -> files in the cache of this user."""

from __future__ import annotations

import hashlib
import os
import random
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.console import tracked
from vlft.data.conversation import ImageRef
from vlft.data.image_cache import LARGEST, keep, path_of
from vlft.data.image_kinds import HEAD, other_kind
from vlft.errors import DataError, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import BinaryIO

    import httpx2

ADDRESS = re.compile("https?://", re.IGNORECASE)
AT_ONCE = 16
# The server has too much to do, or fails for now.
PASSING = (408, 425, 429, 500, 502, 503, 504)
MEBIBYTE = 2**20
HINT = "download the image yourself, or drop such records with --on-bad-sample skip"


@dataclass(frozen=True)
class Limits:
    """What an image may cost to download.

    Attributes:
        size: most bytes.
        silence: most seconds without a byte.
        total: most seconds of an attempt.
        attempts: how often it is tried where the fault may pass.
        pause: seconds before the second attempt; each further one waits twice as long.
        longest_pause: most seconds that a server can ask for with Retry-After.
        redirects: most redirects in a row.
    """

    size: int = LARGEST
    silence: float = 20
    total: float = 120
    attempts: int = 4
    pause: float = 1
    longest_pause: float = 30
    redirects: int = 5


LIMITS = Limits()


class _PassingError(Exception):
    """A fault that may be gone at the next attempt; ``after`` the seconds that were asked for."""

    def __init__(self, found: str, after: float | None = None) -> None:
        super().__init__(found)
        self.after = after


def image_ref(given: str, folder: Path) -> ImageRef:
    """The reference to an image: of a web address, or of a path that starts at ``folder``."""
    if ADDRESS.match(given):
        return ImageRef(path_of(given), given, address=given)
    return ImageRef(folder / given, given)


def downloaded(ref: ImageRef) -> Path:
    """The file of one image, which is downloaded if it has a public address and is not there.

    Raises:
        DataError: it cannot be downloaded.
    """
    for error in download_images([ref], allow_private=False).values():
        raise error
    return ref.path


def download_images(
    images: Iterable[ImageRef], *, allow_private: bool, limits: Limits = LIMITS
) -> dict[Path, DataError]:
    """Downloads the images that are not in the cache, several at once.

    Args:
        images: those without an address are left alone.
        allow_private: whether addresses that are not public are connected to.
        limits: of each image.

    Returns:
        By path of the image, why it could not be downloaded.
    """
    wanted = {ref.path: ref.address for ref in images if ref.address and not ref.path.exists()}
    if not wanted:
        return {}
    from vlft.data.web import make_client

    with (
        make_client(
            allow_private=allow_private, silence=limits.silence, redirects=limits.redirects
        ) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        tries = pool.map(
            lambda path: _attempt(
                partial(_download, client, path, wanted[path], limits), path, limits
            ),
            wanted,
        )
        found = tracked(tries, "downloading images", len(wanted))
        return {path: error for path, error in zip(wanted, found, strict=True) if error}


def fetch_image(address: str, path: Path, *, allow_private: bool, limits: Limits) -> None:
    """Downloads an image to a path, beside the cache.

    Raises:
        DataError: it cannot be downloaded.
    """
    from vlft.data.web import make_client

    with make_client(
        allow_private=allow_private, silence=limits.silence, redirects=limits.redirects
    ) as client:

        def fetch() -> None:
            with path.open("wb") as file:
                _fetch(client, address, file, limits)

        if error := _attempt(fetch, path, limits):
            raise error


def _attempt(download: Callable[[], None], path: Path, limits: Limits) -> DataError | None:
    for attempt in range(limits.attempts):
        try:
            download()
        except DataError as error:
            return error
        except OSError as error:
            found = f"cannot be kept ({error.strerror or error})"
            hint = "make room there, or set XDG_CACHE_HOME to another folder"
            return DataError(found, place=shown(path.parent.parent), hint=hint)
        except _PassingError as error:
            last = error
            if attempt + 1 < limits.attempts:
                wait = limits.pause * 2**attempt * random.uniform(0.75, 1.25)
                time.sleep(min(error.after or wait, limits.longest_pause))
        else:
            return None
    return DataError(f"cannot be downloaded, {limits.attempts} times: {last}", hint=HINT)


def _download(client: httpx2.Client, path: Path, address: str, limits: Limits) -> None:
    """Puts the image into the cache.

    Raises:
        DataError: it is no image, too large, or not there.
        _PassingError: it may be there in a moment.
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            digest = _fetch(client, address, file, limits)
        keep(part, digest, path)
    finally:
        part.unlink(missing_ok=True)


def _fetch(client: httpx2.Client, address: str, file: BinaryIO, limits: Limits) -> str:
    """Writes the image of an address into a file; returns its SHA-256. See ``_download``."""
    import httpcore2
    import httpx2

    from vlft.data.web import deadline

    deadline.set(time.monotonic() + limits.total)
    try:
        with client.stream("GET", address) as response:
            _check_status(response)
            return _write(response, file, limits.size)
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpcore2.UnsupportedProtocol):
        raise DataError("leads to what is no web address", hint=HINT) from None
    except httpx2.TooManyRedirects:
        raise DataError(f"more than {limits.redirects} redirects", hint=HINT) from None
    except httpx2.DecodingError as error:
        raise DataError(f"cannot be unpacked ({error})", hint=HINT) from None
    except httpcore2.TimeoutException:
        raise _PassingError("the server is too slow") from None
    except (httpcore2.NetworkError, httpcore2.ProtocolError) as error:
        raise _PassingError(str(error) or type(error).__name__) from None


def _check_status(response: httpx2.Response) -> None:
    status = f"HTTP {response.status_code} {response.reason_phrase}".rstrip()
    if response.status_code in PASSING:
        after = response.headers.get("Retry-After", "")
        raise _PassingError(status, float(after) if after.isdecimal() else None)
    if response.status_code != 200:
        raise DataError(status, hint=HINT)


def _write(response: httpx2.Response, file: BinaryIO, most: int) -> str:
    """Writes the body and returns its SHA-256.

    Raises:
        DataError: it is too large, or no image.
    """
    stated = response.headers.get("Content-Length", "")
    _check_size(int(stated) if stated.isdecimal() else 0, most)
    digest, head, written = hashlib.sha256(), b"", 0
    for chunk in response.iter_bytes():
        written += len(chunk)
        _check_size(written, most)
        head = head or chunk[:HEAD]
        digest.update(chunk)
        file.write(chunk)
    if known := other_kind(head, written):
        raise DataError(f"the address gives {known[0]}", hint=known[1])
    return digest.hexdigest()


def _check_size(size: int, most: int) -> None:
    if size > most:
        found = f"{size / MEBIBYTE:,.1f} MiB, at most {most / MEBIBYTE:,.1f} are read"
        raise DataError(found, hint="make the image smaller, and name the file")
