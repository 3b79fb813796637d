"""The folder of ``vlft draw``: a PNG file per image, which says what it was drawn from.

00001-01.png, 00001-02.png, ..., 00002-01.png    prompt and image, counted from 1
sheet-01.png, ...                                all of them, small
drawings.jsonl                                   a line per image, for vlft eval
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from vlft.errors import ConfigError, raise_all, shown
from vlft.files import json_text, open_regular, replacing, write_whole
from vlft.locks import locked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

# The entry of a PNG file that holds what it was drawn from, as JSON.
ENTRY = "vlft"
# The list of all images, and the start of each of its lines, by which a list of ours is known.
LIST, START = "drawings.jsonl", b'{"drawing": '
# Images of a sheet, the side of each in pixels, and the height of its name.
PER_SHEET, SIDE, CAPTION = 100, 128, 14
# Facts of an image that another release may state otherwise: the image counts as drawn already.
UNCHECKED = ("vlft",)


class ImageFiles:
    """The files of some images, each whole or absent.

    Args:
        folder: for the files; made when it is needed.
        prompts: number of prompts.
        num_images: of each prompt.
        facts_of: (prompt, image) -> what the image is drawn from, as JSON values.
        overwrite: whether other files are replaced.
    """

    def __init__(
        self,
        folder: Path,
        prompts: int,
        num_images: int,
        facts_of: Callable[[int, int], Mapping[str, Any]],
        *,
        overwrite: bool,
    ) -> None:
        self.folder = folder
        self._num_images = num_images
        self._count = prompts * num_images
        self._facts_of = facts_of
        self._overwrite = overwrite

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the folder for this process while the block runs.

        Raises:
            UsageError: it is no folder, or another process has it.
        """
        if self.folder.exists() and not self.folder.is_dir():
            hint = "name another --output-dir"
            raise ConfigError("not a folder", place=shown(self.folder), hint=hint)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / ".draw.lock", self.folder):
            yield

    def find_missing(self) -> set[int]:
        """The numbers of the images that are not there yet.

        Raises:
            ConfigError: there is another file in the place of one, unless they are replaced.
        """
        missing, problems = set[int](), []
        for number in range(self._count):
            path = self.path(number)
            found = read_facts(path) if path.exists() or path.is_symlink() else None
            if found is not None and _same(found, self.facts(number)):
                continue
            missing.add(number)
            if found is not None:
                problems.append(_other(path, found, self.facts(number)))
        others = [path for path in self._sheets() if path.exists() and not read_facts(path)]
        if (listed := self.folder / LIST).exists() and not _is_list(listed):
            others.append(listed)
        problems += [_other(path, {}, {}) for path in others]
        raise_all([] if self._overwrite else problems)
        return missing

    def path(self, number: int) -> Path:
        """The file of an image."""
        prompt, image = divmod(number, self._num_images)
        return self.folder / f"{prompt + 1:05}-{image + 1:02}.png"

    def facts(self, number: int) -> Mapping[str, Any]:
        """What an image is drawn from."""
        return self._facts_of(*divmod(number, self._num_images))

    def save(self, number: int, image: Image.Image) -> None:
        """Writes an image."""
        _save(self.path(number), image, self.facts(number))

    def write_sheets(self) -> list[Path]:
        """Writes small versions of all images, some hundred to a file, and says where."""
        sheets = self._sheets()
        for page, path in enumerate(sheets):
            numbers = range(page * PER_SHEET, min((page + 1) * PER_SHEET, self._count))
            files = [self.path(number) for number in numbers]
            _save(path, _sheet(files, self._num_images), {"sheet": [p.name for p in files]})
        return sheets

    def write_list(self, row_of: Callable[[int], Mapping[str, Any]]) -> None:
        """Writes a line per image: its file as the response, and what ``row_of`` its prompt says.

        That is a result file, as ``vlft infer`` writes them.
        """
        lines = []
        for number in range(self._count):
            path = self.path(number)
            row = {"drawing": path.name, **row_of(number // self._num_images)}
            lines.append(json_text({**row, "response": str(path.absolute())}) + "\n")
        write_whole(self.folder / LIST, "".join(lines))

    def _sheets(self) -> list[Path]:
        pages = -(-self._count // PER_SHEET)
        return [self.folder / f"sheet-{page + 1:02}.png" for page in range(pages)]


def read_facts(path: Path) -> dict[str, Any]:
    """What a PNG file says that it was drawn from; empty for a file of another program."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            found = json.loads(image.info.get(ENTRY, "{}"))
    except (OSError, SyntaxError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return not _differences(found, wanted)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*wanted, *found])
    # As JSON has them, where a tuple is a list.
    known = json.loads(json_text(dict(wanted)))
    return [n for n in names if n not in UNCHECKED and found.get(n) != known.get(n)]


def _other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> ConfigError:
    hint = "name another --output-dir, or add --overwrite to replace it"
    if not found:
        return ConfigError("is there, and vlft has not drawn it", place=shown(path), hint=hint)
    name = _differences(found, wanted)[0]
    text = f"was drawn with another {name}, {found.get(name)}"
    return ConfigError(text, place=shown(path), hint=hint)


def _is_list(path: Path) -> bool:
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(len(START)) in (START, b"")


def _save(path: Path, image: Image.Image, facts: Mapping[str, Any]) -> None:
    info = PngInfo()
    info.add_itxt(ENTRY, json.dumps(facts))
    with replacing(path) as part:
        image.save(part, format="PNG", pnginfo=info)


def _sheet(files: Sequence[Path], num_images: int) -> Image.Image:
    """The images on one canvas, a row for each prompt if it has several, with their names."""
    columns = min(num_images, 10) if num_images > 1 else math.ceil(math.sqrt(len(files)))
    rows = -(-len(files) // columns)
    canvas = Image.new("RGB", (columns * SIDE, rows * (SIDE + CAPTION)), "white")
    pen = ImageDraw.Draw(canvas)
    for place, path in enumerate(files):
        row, column = divmod(place, columns)
        left, top = column * SIDE, row * (SIDE + CAPTION)
        with Image.open(path, formats=["PNG"]) as image:
            small = image.convert("RGB").resize((SIDE - 4, SIDE - 4), Image.Resampling.BICUBIC)
        canvas.paste(small, (left + 2, top + 2))
        pen.text((left + 2, top + SIDE), path.stem, fill="black")
    return canvas
