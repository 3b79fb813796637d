"""JSON text -> records: an array, or objects one after the other with white space between."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, cast

from vlft.data.containers.indexed import Indexed
from vlft.data.containers.window import Window, skip_blank
from vlft.data.names import IMAGES, OF_A_RECORD
from vlft.data.records import BOM, EXAMPLE, kind_of
from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from typing import BinaryIO

    from vlft.data.containers.indexed import Indexing

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


def read_json(file: BinaryIO, named: Collection[str] = ()) -> tuple[str, Indexed, str]:
    """The kind of a JSON file, its records, and a note on where they were found.

    Args:
        file: not empty; its records are read from it when they are needed.
        named: further keys that only a record has.

    Raises:
        BrokenTextError: an array, or the one object of the file, cannot be read to its end.
        NotTextError: it is no UTF-8.
    """
    file.seek(0)
    window = Window(file)
    window.skip_blank()
    records = Indexed(file, record_at)
    if window.text[window.position :].startswith("["):
        for place, problem in _array(window):
            records.add(place, problem)
        return "a JSON array", records, ""
    for place, problem in _objects(window):
        records.add(place, problem)
    if len(records) == 1:
        line, only = records[0]
        if isinstance(only, dict) and only and not _is_record(only, named):
            return _inside(file, line, only)
    return "JSON Lines", records, ""


def _is_record(value: dict[str, Any], named: Collection[str]) -> bool:
    """Whether an object has a key of the layouts, or names images."""
    named_images = (value.get(name) for name in IMAGES)
    return not value.keys().isdisjoint({*OF_A_RECORD, *named}) or any(
        isinstance(item, str) or (isinstance(item, list) and item and isinstance(item[0], str))
        for item in named_images
    )


def record_at(data: bytes) -> dict[str, Any] | list[Any] | DataError:
    """Parses one record from its bytes; bytes of the next record may follow."""
    text = data.decode("utf-8", "ignore")
    return _record(_decoder.raw_decode(text, skip_blank(text, 0))[0])


def _inside(file: BinaryIO, line: int, value: dict[str, Any]) -> tuple[str, Indexed, str]:
    """The records in the only list of objects of an object."""
    lists = [
        name
        for name, item in value.items()
        if isinstance(item, list) and item and all(isinstance(part, dict) for part in item)
    ]
    if len(lists) == 1:
        file.seek(0)
        window = Window(file)
        window.skip_blank()
        _move_to_value(window, lists[0])
        records = Indexed(file, record_at)
        for place, problem in _array(window, is_part=True):
            records.add(place, problem)
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


def _move_to_value(window: Window, key: str) -> None:
    """Moves from the start of an object to the value of a key."""
    name = None
    while name != key:
        # After a bracket or a comma comes a key, after the key a colon.
        window.position += 1
        window.skip_blank()
        name, window.position = window.decode(_decoder)
        window.skip_blank()
        window.position += 1
        window.skip_blank()
        if name != key:
            _, window.position = window.decode(_decoder)
            window.skip_blank()


def _objects(window: Window) -> Iterator[Indexing]:
    """The values one after the other; behind a bad one, reading goes on at the next line."""
    while window.skip_blank():
        place = window.offset, window.line
        try:
            value, window.position = window.decode(_decoder)
            yield place, _problem_of(value)
        except _KeyTwiceError as error:
            yield place, DataError(str(error), hint="keep one of the two")
            window.position = window.decode(_lenient)[1]
        except (ValueError, RecursionError) as error:
            line, problem, window.position = _bad_object(window, error)
            yield (place[0], line), problem


def _bad_object(window: Window, error: ValueError | RecursionError) -> tuple[int, DataError, int]:
    """The line and the problem of a text that is no value, and where the next one may start."""
    window.read_line()
    text, position, end, line = window.text, window.position, window.line_end, window.line
    following = text[skip_blank(text, end) :][:1]
    if getattr(error, "pos", position) > end and following not in ("", "{", "["):
        # An object over several lines: the next one starts a line.
        problem = _problem(window, error, LINES)
        after = window.find("\n{", position + 1)
        return problem.line, problem, len(window.text) if after < 0 else after
    first = text.rfind("\n", 0, position) + 1
    alone = text[first:end].lstrip(BOM)
    start = position - first - (end - first - len(alone))
    try:
        _decoder.raw_decode(alone, start)
    except (ValueError, RecursionError) as of_line:
        error = of_line
    comma = _comma(alone, error)
    if comma is not None:
        return line, DataError(f"a comma before {comma[0]!r}", hint="remove the comma"), end
    cause = CAUSES.get(alone[getattr(error, "pos", 0) :][:1], LINES)
    return line, DataError(f"not JSON: {reason(error)}", hint=cause), end


def _array(window: Window, *, is_part: bool = False) -> Iterator[Indexing]:
    """The items of an array; raises BrokenTextError where it cannot be read."""
    mark = "["
    window.position += 1
    window.skip_blank()
    if window.text.startswith("]", window.position):
        mark, window.position = "]", window.position + 1
    while mark != "]":
        window.skip_blank()
        place = window.offset, window.line
        try:
            value, end = window.decode(_decoder)
            yield place, _problem_of(value)
        except _KeyTwiceError as error:
            yield place, DataError(str(error), hint="keep one of the two")
            end = window.decode(_lenient)[1]
        except (ValueError, RecursionError) as error:
            raise _problem(window, error, ARRAY) from None
        window.position = end
        window.skip_blank()
        mark = window.text[window.position : window.position + 1]
        if mark not in (",", "]"):
            found = f"found {mark!r}" if mark else "the file ends"
            found += " where the array goes on with ',' or ends with ']'"
            raise BrokenTextError(window.line_of(window.position), found, ARRAY)
        window.position += 1
    if not is_part and window.skip_blank():
        found = "found text after the end of the array"
        raise BrokenTextError(window.line_of(window.position), found, ARRAY)


def _problem(window: Window, error: ValueError | RecursionError, hint: str) -> BrokenTextError:
    """The problem of a text over several lines, with the line of its cause."""
    comma = _comma(window.text, error)
    if comma is not None:
        mark, place = comma
        found = f"a comma before {mark!r}"
        return BrokenTextError(window.line_of(place), found, "remove the comma")
    place = getattr(error, "pos", window.position)
    hint = CAUSES.get(window.text[place : place + 1], hint)
    return BrokenTextError(window.line_of(place), f"not JSON: {reason(error)}", hint)


def _comma(text: str, error: ValueError | RecursionError) -> tuple[str, int] | None:
    """The closing bracket and the place of a comma before it that is the cause of an error."""
    if not isinstance(error, json.JSONDecodeError):
        return None
    # The message names the bracket, or the comma itself.
    place = skip_blank(text, error.pos + (text[error.pos : error.pos + 1] == ","))
    before = text[:place].rstrip()
    if before.endswith(",") and text[place : place + 1] in ("]", "}"):
        return text[place], len(before) - 1
    return None


def _problem_of(value: object) -> DataError | None:
    return None if isinstance(value, dict | list) else cast("DataError", _record(value))


def _record(value: object) -> dict[str, Any] | list[Any] | DataError:
    if isinstance(value, dict | list):
        return value
    return DataError(f"found {kind_of(value)}, an object is allowed", hint=EXAMPLE)


def reason(error: ValueError | RecursionError) -> str:
    """Why a text is not JSON, in words."""
    if isinstance(error, json.JSONDecodeError):
        # Some messages of the json module end with "at" already.
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "too deeply nested" if isinstance(error, RecursionError) else "a number is too long"
