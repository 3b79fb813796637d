"""Reading and writing JSON, hashing files and writing tensors, with errors that name the file."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.console import warn
from vlft.errors import LONE_SURROGATE, CheckpointError, ConfigError, shown
from vlft.locks import hold
from vlft.schema import AGAIN, check_fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import BufferedReader

    from safetensors import safe_open
    from torch import Tensor

    from vlft.schema import Schema


# A full disk, a used-up quota, a file that is too large.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
# The largest small file, in bytes: tokenizer.json of published models has about 8 MB.
LARGEST = 2**27
# What a kill leaves of a file that was being written, see ``replacing``.
LEFT_FILE = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part", re.DOTALL)
# The system's error number, as Rust ends the text of an error.
_warn_once = functools.cache(warn)
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def read_object_if_there(path: Path, schema: Schema) -> dict[str, Any]:
    """As ``read_object``, but an empty object if there is no such file."""
    return read_object(path, schema) if os.path.lexists(path) else {}


def read_object(path: Path, schema: Schema) -> dict[str, Any]:
    """The object in a JSON file, whose fields keep to a schema.

    Raises:
        CheckpointError: the file is missing, is no JSON, or holds something else.
    """
    try:
        text = read_text(path)
        value = json.loads(text, object_pairs_hook=lambda pairs: _table(pairs, path))
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"not JSON: {reason}", place=shown(path), hint=AGAIN) from None
    if not isinstance(value, dict):
        found = f"found {type(value).__name__}, an object is allowed"
        raise CheckpointError(found, place=shown(path), hint=AGAIN)
    check_fields(value, schema, shown(path))
    return value


def read_own(path: Path, schema: Schema) -> dict[str, Any]:
    """As ``read_object_if_there``, for a file that vlft writes: fields that are null are left out.

    Every field of such a file is of one type where it is there, so that nothing else can be absent.
    """
    found: dict[str, Any] = without_nulls(read_object_if_there(path, schema))
    return found


def without_nulls(value: Any) -> Any:
    """A value of JSON without the fields that are null, at any depth."""
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}


def _table(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """The object of a file; a key that stands twice is named, once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        _warn_once(f"{shown(path)}: {twice!r} stands twice in an object; the last one counts")
    return found


def cache_folder(name: str, instead: str = "") -> Path:
    """A folder of what vlft keeps for this user; it may not exist yet.

    Args:
        name: of the folder.
        instead: what else the user may do, for the message.

    Raises:
        ConfigError: the user has no home folder.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        hint = f"set XDG_CACHE_HOME to a folder for it{instead}"
        raise ConfigError("no home folder for the cache", place="HOME", hint=hint) from None
    return Path(base) / "vlft" / name


def read_text(path: Path) -> str:
    """The text of a regular file.

    Raises:
        CheckpointError: the file is missing, no regular one, too large, or not UTF-8.
    """
    hint = AGAIN
    try:
        with open_regular(path) as file:
            content = file.read(LARGEST + 1)
        if len(content) <= LARGEST:
            return content.decode("utf-8")
        found = f"larger than {LARGEST:,} bytes"
    except FileNotFoundError:
        found, path = f"no {path.name}", path.parent
        hint = "name the folder that holds it"
    except UnicodeDecodeError as error:
        found = f"not UTF-8 (byte {error.start})"
    except OSError as error:
        found = f"cannot be read ({error.strerror or error})"
    raise CheckpointError(found, place=shown(path), hint=hint)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_home(path: str) -> str:
    """The path with the home folder in the place of its ``~``."""
    # Path.expanduser raises RuntimeError for the ~name of an unknown user; this leaves it alone.
    return os.path.expanduser(path)  # noqa: PTH111


def real_path(path: Path) -> Path:
    """The absolute path without symbolic links; links in a circle stay, as they lead nowhere."""
    # Path.resolve raises RuntimeError for a circle.
    return Path(os.path.realpath(path))


def same_file(path: Path, other: Path) -> bool:
    """Whether both are names of one file that is there."""
    return path.exists() and other.exists() and path.samefile(other)


def json_text(value: Any, indent: int | None = None) -> str:
    """The value as JSON; escaped if a path in it has bytes that are not UTF-8."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return json.dumps(value, indent=indent) if LONE_SURROGATE.search(text) else text


def is_disk_full(error: OSError) -> bool:
    """Whether a disk, a quota or the size of a file is the reason of an error."""
    return error.errno in DISK_FULL


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of the path once it is whole and on the disk.

    Folders that it lacks are made. After an error nothing is left of it; after a kill the next call
    removes it.
    """
    # Names are 255 bytes at most.
    name = path.name.encode(errors="surrogateescape")[:200].decode(errors="ignore")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent, name)
    part = path.with_name(f".{name}.{os.urandom(4).hex()}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        hold(descriptor)
        yield part
        flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one step: after an error or a kill it is as it was before."""
    with replacing(path) as part:
        part.write_text(text, "utf-8")


def _sweep(folder: Path, name: str) -> None:
    """Removes what kills have left of a file; what a living process writes is locked."""
    for path in folder.iterdir():
        found = LEFT_FILE.fullmatch(path.name)
        if found and found[1] == name and path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if hold(file.fileno()):
                    path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Has the system write a folder, and all that is in it, to the disk."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Has the system write a file or a folder's names to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        # Windows opens no folders.
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush a folder.
        if not (path.is_dir() and error.errno in CANNOT_FLUSH):
            raise
    finally:
        os.close(descriptor)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file whose permissions follow the user's umask.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        # It puts a new file in its place, which only the user can read.
        save_file(dict(tensors), path, metadata=dict(metadata or {"format": "pt"}))
    except SafetensorError as error:
        if (found := _SYSTEM_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode & 0o777)


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, open for reading.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        SafetensorError: it is damaged.
    """
    from safetensors import safe_open

    # Its own opening would wait for the writer of a pipe.
    open_regular(path).close()
    return safe_open(path, framework="pt")


def open_regular(path: Path) -> BufferedReader:
    """The file, open for reading bytes.

    Raises:
        OSError: it cannot be opened, or is no regular file: a folder, a pipe, a device.
    """

    def regular(name: str, flags: int) -> int:
        # Without O_NONBLOCK the call would wait for the writer of a pipe.
        descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return descriptor

    return open(path, "rb", opener=regular)


def sample_folder(name: str) -> Path:
    """A folder of the sample data, which a wheel carries in the package.

    An editable installation uses the repository's.
    """
    package = Path(__file__).resolve().parent
    in_repository = package.parent / "sample_data" / name
    return in_repository if in_repository.is_dir() else package / name
