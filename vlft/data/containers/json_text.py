"""JSON text -> records: an array, or objects one after the other with white space between."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from vlft.data.names import OF_A_RECORD
from vlft.data.records import BOM, EXAMPLE, kind_of
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from vlft.data.records import Found

ARRAY = "write one array, [{...}, {...}], or one JSON object per line"
LINES = "write one JSON object per line"
# Files that an object may name, as lists of data sets do.
DATA_FILE = re.compile(r".+\.(jsonl?|csv|tsv|parquet)(\.gz)?", re.IGNORECASE)
# What stands where JSON allows something else -> why.
CAUSES = {
    "'": "JSON has double quotes; json.dumps writes them",
    "/": "JSON has no comments",
    "#": "JSON has no comments",
}


class BrokenTextError(DataError):
    """Text after which no record can be read.

    Attributes:
        line: of it.
    """

    def __init__(self, line: int, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.line = line


class _KeyTwiceError(ValueError):
    """A key that stands twice in one object."""


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _KeyTwiceError(f'the key "{twice}" stands twice in an object')
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_object_of)
_lenient = json.JSONDecoder()
_blank = re.compile(f"[ \\t\\r\\n{BOM}]*")


def read_json(text: str, named: Collection[str] = ()) -> tuple[str, list[Found], str]:
    """The kind of a JSON text, its records, and a note on where they were found.

    Args:
        text: of the file.
        named: further keys that only a record has.

    Raises:
        BrokenTextError: an array, or the one object of the file, cannot be read to its end.
    """
    start = _skip_blank(text, 0)
    if text[start] == "[":
        return "a JSON array", list(_array(text, start)), ""
    found = list(_objects(text, start))
    line, only = found[0]
    if (
        len(found) == 1
        and isinstance(only, dict)
        and only
        and only.keys().isdisjoint({*OF_A_RECORD, *named})
    ):
        return _inside(text, start, line, only)
    return "JSON Lines", found, ""


def _inside(
    text: str, start: int, line: int, value: dict[str, Any]
) -> tuple[str, list[Found], str]:
    """The records in the only list of objects of an object."""
    lists = [
        name
        for name, item in value.items()
        if isinstance(item, list) and item and all(isinstance(part, dict) for part in item)
    ]
    if len(lists) == 1:
        records = list(_array(text, _value_start(text, start, lists[0]), is_part=True))
        return "JSON", records, f'reads the list under "{lists[0]}"'
    found = f"found one object with the keys {', '.join(list(value)[:12])}"
    found += ", ..." if len(value) > 12 else ""
    if lists:
        found += f"; of its lists {' and '.join(lists)} hold objects, one may"
    raise BrokenTextError(line, found, _named_files(value) or ARRAY)


def _named_files(value: dict[str, Any]) -> str:
    """What to do with a file of COCO, or an object that names data files and image folders."""
    if {"images", "annotations"} <= value.keys():
        return "vlft data converts COCO files, see vlft data --help"
    inner = [item for item in value.values() if isinstance(item, dict)]
    texts = [(k, v) for item in [value, *inner] for k, v in item.items() if isinstance(v, str)]
    files = [text for _, text in texts if DATA_FILE.fullmatch(text)]
    roots = [text for name, text in texts if name in ("root", "media_dir", "media_root")]
    if not files:
        return ""
    root = f", with --image-root {roots[0]}" if roots else ""
    return f"name the data files that it lists: {', '.join(files[:5])}{root}"


def _value_start(text: str, position: int, key: str) -> int:
    """Where the value of a key of the object at a position starts."""
    while True:
        name, end = _decoder.raw_decode(text, _skip_blank(text, position + 1))
        position = _skip_blank(text, _skip_blank(text, end) + 1)
        if name == key:
            return position
        position = _skip_blank(text, _decoder.raw_decode(text, position)[1])


def _objects(text: str, position: int) -> Iterator[Found]:
    """The values one after the other; behind a bad one, reading goes on at the next line."""
    line, counted = 1, 0
    while (position := _skip_blank(text, position)) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _decoder.raw_decode(text, position)
            yield line, _record(value)
        except _KeyTwiceError as error:
            yield line, DataError(str(error), hint="keep one of the two")
            position = _lenient.raw_decode(text, position)[1]
        except (ValueError, RecursionError) as error:
            found, position = _bad_object(text, position, line, error)
            yield found


def _bad_object(
    text: str, position: int, line: int, error: ValueError | RecursionError
) -> tuple[Found, int]:
    """The problem of a text that is no value, and where the next one may start."""
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    following = text[_skip_blank(text, end) :][:1]
    if getattr(error, "pos", position) > end and following not in ("", "{", "["):
        # An object over several lines: the next one starts a line.
        after = text.find("\n{", position + 1)
        problem = _problem(text, error, position, LINES)
        return (problem.line, problem), len(text) if after < 0 else after
    first = text.rfind("\n", 0, position) + 1
    alone = text[first:end].lstrip(BOM)
    start = position - first - (end - first - len(alone))
    try:
        _decoder.raw_decode(alone, start)
    except (ValueError, RecursionError) as of_line:
        error = of_line
    comma = _comma(alone, error)
    if comma is not None:
        return (line, DataError(f"a comma before {comma[0]!r}", hint="remove the comma")), end
    cause = CAUSES.get(alone[getattr(error, "pos", 0) :][:1], LINES)
    return (line, DataError(f"not JSON: {reason(error)}", hint=cause)), end


def _array(text: str, position: int, *, is_part: bool = False) -> Iterator[Found]:
    """The items of an array; raises BrokenTextError where it cannot be read."""
    line, counted = 1, 0
    position, mark = position, "["
    if text.startswith("]", _skip_blank(text, position + 1)):
        position, mark = _skip_blank(text, position + 1), "]"
    while mark != "]":
        position = _skip_blank(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = _decoder.raw_decode(text, position)
            yield line, _record(value)
        except _KeyTwiceError as error:
            yield line, DataError(str(error), hint="keep one of the two")
            end = _lenient.raw_decode(text, position)[1]
        except (ValueError, RecursionError) as error:
            raise _problem(text, error, position, ARRAY) from None
        position = _skip_blank(text, end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            found = f"found {mark!r}" if mark else "the file ends"
            found += " where the array goes on with ',' or ends with ']'"
            raise BrokenTextError(_line(text, position), found, ARRAY)
    if not is_part and (rest := _skip_blank(text, position + 1)) < len(text):
        raise BrokenTextError(_line(text, rest), "found text after the end of the array", ARRAY)


def _problem(
    text: str, error: ValueError | RecursionError, position: int, hint: str
) -> BrokenTextError:
    """The problem of a text over several lines, with the line of its cause."""
    comma = _comma(text, error)
    if comma is not None:
        mark, place = comma
        return BrokenTextError(_line(text, place), f"a comma before {mark!r}", "remove the comma")
    place = getattr(error, "pos", position)
    hint = CAUSES.get(text[place : place + 1], hint)
    return BrokenTextError(_line(text, place), f"not JSON: {reason(error)}", hint)


def _comma(text: str, error: ValueError | RecursionError) -> tuple[str, int] | None:
    """The closing bracket and the place of a comma before it that is the cause of an error."""
    if not isinstance(error, json.JSONDecodeError):
        return None
    # The message names the bracket, or the comma itself.
    place = _skip_blank(text, error.pos + (text[error.pos : error.pos + 1] == ","))
    before = text[:place].rstrip()
    if before.endswith(",") and text[place : place + 1] in ("]", "}"):
        return text[place], len(before) - 1
    return None


def _record(value: object) -> dict[str, Any] | list[Any] | DataError:
    if isinstance(value, dict | list):
        return value
    return DataError(f"found {kind_of(value)}, an object is allowed", hint=EXAMPLE)


def _skip_blank(text: str, position: int) -> int:
    found = _blank.match(text, position)
    return found.end() if found else position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, min(position, len(text.rstrip()))) + 1


def reason(error: ValueError | RecursionError) -> str:
    """Why a text is not JSON, in words."""
    if isinstance(error, json.JSONDecodeError):
        # Some messages of the json module end with "at" already.
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number is too long"
