"""Seeded damage to files: JSON fields, headers of weights, lines, images, bytes, kinds of file."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

# Values that replace a field of a JSON file; DELETE stands for removing the field.
DELETE = object()
VALUES = (
    None, "", "x", [], {}, [[]], -1, 0, 1, 3, 10**9, 10**30, 1.5, 1e-300, 1e300, True, False,
    float("nan"), float("inf"), "a" * 100_000, "\x1b[31m\nerror: x", "../../x", "/dev/zero",
    "\ud800", "a\0b", ["x"], [1, -1], {"x": 1}, [None] * 3, 64, 2**31, 2**63, "64", DELETE, DELETE,
)  # fmt: skip
# In the place of a pattern of an adapter, or of a tokenizer.
PATTERNS = (
    "(a+)+$", "(.*)*x", ".*.*.*.*.*.*.*.*!", ".+.+.+.+.+.+.+.+.+.+!", ".?" * 40 + "!" * 40,
    ".{0,60}.{0,60}.{0,60}.{0,60}.{0,60}!", "(?=(.*)*!)", "(", "[a", "(?P<a>x)(?P=a)*", "a" * 9999,
)  # fmt: skip


def damage(path: Path, chance: random.Random) -> str:
    """Damages a file in place; says how."""
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes]
    if path.suffix == ".json":
        kinds = [_field] * 12 + [_bytes]
    elif path.suffix == ".jsonl":
        kinds = [_line] * 3 + [_bytes]
    elif path.suffix == ".safetensors":
        kinds = [_header] * 3 + [_values, _bytes]
    return chance.choice(kinds)(path, chance)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to the values in a JSON value; of long lists and objects the first few."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(items)[:40]:
        found.append((*path, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with another value at a path."""
    changed = copy.deepcopy(value)
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    if new is DELETE:
        del owner[path[-1]]
    else:
        owner[path[-1]] = new
    return changed


def _changed(value: Any, chance: random.Random) -> tuple[Any, str]:
    """The JSON value with another one somewhere in it, and what that is."""
    # A depth first, so that a long vocabulary does not take all trials.
    found = places(value)
    depth = chance.choice(sorted({len(place) for place in found}))
    place = chance.choice([place for place in found if len(place) == depth])
    is_pattern = any(word in str(place[-1]) for word in ("module", "pattern", "Regex", "content"))
    new = chance.choice(PATTERNS if is_pattern and chance.random() < 0.5 else VALUES)
    words = "nothing" if new is DELETE else repr(new)[:40]
    return replaced(value, place, new), f"{'.'.join(map(str, place))} = {words}"


def _field(path: Path, chance: random.Random) -> str:
    value = json.loads(path.read_bytes())
    if not value:
        return _bytes(path, chance)
    if chance.random() < 0.05:
        # Another value under the same key, which some readers take and others do not.
        key = chance.choice(sorted(value))
        text = (
            json.dumps(value)[:-1]
            + f", {json.dumps(key)}: {json.dumps(chance.choice(VALUES[:9]))}}}"
        )
        path.write_text(text)
        return f"{key} twice"
    changed, how = _changed(value, chance)
    path.write_text(json.dumps(changed))
    return how


def _line(path: Path, chance: random.Random) -> str:
    lines = path.read_text().splitlines()
    if not lines:
        return _bytes(path, chance)
    at = chance.randrange(len(lines))
    how = chance.choice(("field", "field", "twice", "gone", "cut", "blank"))
    if how == "field":
        changed, how = _changed(json.loads(lines[at]), chance)
        lines[at] = json.dumps(changed)
    else:
        new = {"twice": [lines[at]] * 2, "gone": [], "cut": [lines[at][:9]], "blank": [""]}
        lines[at : at + 1] = new[how]
    path.write_text("".join(line + "\n" for line in lines))
    return f"line {at}: {how}"


def _bytes(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    at = chance.randrange(max(1, min(len(content), 4000)))
    kinds = ("cut", "empty", "flip", "text", "deep", "list", "marked", *ODD)
    how = chance.choice(kinds)
    path.unlink()
    if how in ODD:
        make_odd(path, how)
        return how
    flipped = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :] if content else b"\xff"
    path.write_bytes(
        {
            "cut": content[:at],
            "empty": b"",
            "flip": flipped,
            "text": b"hello\n",
            "deep": b"[" * 100_000,
            "list": b"[1, 2]",
            "marked": b"\xef\xbb\xbf" + content,
        }[how]
    )
    return f"{how} at {at}"


# Kinds of path that are no regular file; reading one can hang or fill the memory.
ODD = ("pipe", "folder", "circle", "nowhere", "zeros")


def make_odd(path: Path, kind: str) -> None:
    """Puts something at a path that is not a regular file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        names = {"circle": path.name, "nowhere": "not-there", "zeros": "/dev/zero"}
        path.symlink_to(names[kind])


def _header(path: Path, chance: random.Random) -> str:
    """Changes the header of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    how = chance.choice(("dtype", "shape", "offsets", "name", "drop", "other", "length"))
    if how == "dtype":
        header[name]["dtype"] = chance.choice(("F16", "I64", "BOOL", "F8_E4M3", "X", 3))
    elif how == "shape":
        header[name]["shape"] = chance.choice(([], [-1], [2**62, 4], header[name]["shape"][::-1]))
    elif how == "offsets":
        header[name]["data_offsets"] = chance.choice(([0, 2**60], [5, 1], ["a", "b"], None))
    elif how == "name":
        header[chance.choice(("", "x", "../x", "a" * 10_000, "\x1b[31m"))] = header.pop(name)
    elif how == "other":
        header["__metadata__"] = chance.choice(({"a": 1}, [], "x", {"vlft_base": "1:0"}))
    elif how == "drop":
        del header[name]
    text = json.dumps(header).encode()
    stated = chance.choice((0, 2**40, 2**63)) if how == "length" else len(text)
    path.write_bytes(stated.to_bytes(8, "little") + text + content[8 + length :])
    return f"{how} of {name}"


def _values(path: Path, chance: random.Random) -> str:
    """Fills the numbers of a tensor, or of all, with one byte."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    name = chance.choice([key for key in header if key != "__metadata__"])
    first, last = header[name]["data_offsets"]
    if chance.random() < 0.2:
        name, first, last = "all", 0, len(content) - start
    byte = chance.choice((0, 0x7F, 0xFF))
    content[start + first : start + last] = bytes([byte]) * (last - first)
    path.write_bytes(content)
    return f"bytes of {name} = {byte}"


MODES = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "jpeg": ("L", "RGB", "CMYK"),
    "gif": ("L", "P", "RGB"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("1", "L", "P", "RGB"),
    "tiff": ("1", "L", "RGB", "RGBA", "CMYK", "F", "I;16", "LAB"),
}
SIZES = ((70_000_000, 1), (1, 70_000_000), (20_000, 20_000), (13_000, 13_000), (1, 1), (60_000, 9))


def write_image(path: Path, chance: random.Random) -> str:
    """Writes an image file that is damaged, or whole and of an odd kind; says how."""
    name = chance.choice(sorted(MODES))
    mode = chance.choice(MODES[name])
    how = chance.choice(("flip", "flip", "flip", "cut", "size", "bomb", "note", "frames", "odd"))
    if how == "odd":
        kind = chance.choice(ODD)
        make_odd(path, kind)
        return kind
    if how == "bomb":
        size = chance.choice(SIZES)
        path.write_bytes(_bomb(*size))
        return f"{size[0]} x {size[1]} pixels"
    content = bytearray(_image(name, mode, how, chance))
    if how == "flip":
        # Most of them near the start, where the formats have their fields.
        for _ in range(chance.choice((1, 1, 3, 20))):
            most = chance.choice((64, 256, len(content)))
            content[chance.randrange(min(most, len(content)))] = chance.choice((0, 1, 127, 255))
    elif how == "cut":
        del content[chance.randrange(len(content)) :]
    elif how == "size":
        _state_size(content, name, chance)
    path.write_bytes(content)
    return f"{name} {mode} {how}"


def _image(name: str, mode: str, how: str, chance: random.Random) -> bytes:
    """A whole image file; with notes or frames if that is asked for."""
    size = chance.choice(((1, 1), (3, 200), (48, 48), (90, 40)))
    image = Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1]))
    if mode == "LAB":
        image = Image.new("LAB", size)
    elif mode in ("F", "I;16"):
        image = image.convert("L").convert("F" if mode == "F" else "I").convert(mode)
    else:
        image = image.convert(mode)
    options: dict[str, Any] = {}
    if how == "note" and name in ("png", "jpeg", "webp", "tiff"):
        options["icc_profile"] = chance.randbytes(chance.choice((1, 128, 5000)))
        if name != "tiff":
            options["exif"] = b"Exif\0\0" + _orientation(chance)
    if how == "frames" and name not in ("jpeg", "bmp") and mode[0] != "I":
        options |= {"save_all": True, "append_images": [image] * chance.choice((1, 30, 300))}
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def _orientation(chance: random.Random) -> bytes:
    """An EXIF block with a damaged or odd orientation."""
    kind, count, value = chance.choice(
        ((3, 1, 6), (3, 1, 99), (2, 2**31, 6), (9, 1, 0), (12, 1, 8))
    )
    entry = struct.pack("<HHII", 0x0112, kind, count, value)
    following = chance.choice((0, 8, 2**32 - 1))
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", following)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _bomb(width: int, height: int) -> bytes:
    """A PNG of one colour with one bit for a pixel, which is small whatever its size."""
    row = b"\0" * (1 + (width + 7) // 8)
    squeeze = zlib.compressobj(9)
    body = b"".join([squeeze.compress(row * min(1000, height)) for _ in range(-(-height // 1000))])
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body += squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _state_size(content: bytearray, name: str, chance: random.Random) -> None:
    """Has the header state another size than the content has."""
    width, height = (chance.choice((0, 1, 7, 30_000, 65_535)) for _ in range(2))
    if name == "png":
        head = struct.pack(">II", width * chance.choice((1, 30_000)), height) + content[24:29]
        content[8:33] = _chunk(b"IHDR", bytes(head))
    elif name == "gif":
        content[6:10] = struct.pack("<HH", width, height)
    elif name == "bmp":
        content[18:26] = struct.pack("<ii", width * chance.choice((1, -1)), -height)
    elif name == "jpeg" and (at := content.find(b"\xff\xc0")) >= 0:
        content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif name == "webp":
        content[24:30] = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    else:
        content[4:8] = struct.pack("<I", chance.choice((0, 8, len(content), 2**32 - 1)))
