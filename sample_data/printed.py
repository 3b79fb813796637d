"""Images of printed text and shapes with questions: the training data of the tiny base.

    python sample_data/printed.py OUT_DIR --images 24000 --seed 0
    python sample_data/printed.py OUT_DIR --images 24000 --seed 1 --kinds digit letter --questions 1

Writes OUT_DIR/images/000000.png, ... and OUT_DIR/train.jsonl. Records of one image are
neighbours. Image i depends on the seed and on i alone: with more images the first stay the same.
``--kinds`` and ``--questions`` make easier data: only scenes of these kinds, N questions on each.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from questions import WITHOUT_IMAGE, Exchange, ask
from scenes import COLOURS, SHAPES, Scene, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

# Shares of the images.
KINDS = {"digit": 0.36, "letter": 0.16, "number": 0.14, "word": 0.08, "shape": 0.14, "count": 0.12}
QUESTIONS = (1, 2, 2, 3, 3, 4)  # on an image, equally likely
MULTI_TURN = 0.28  # of the images with two questions or more: about 10 % of the records
TEXT_ONLY = 0.05  # per question on an image: probability of another record without an image

# Letters that cannot be confused with a digit or with a letter of the other case.
CAPITALS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
SMALL = "abdefghnqrty"
WORDS = (
    "at", "be", "do", "go", "hi", "in", "me", "no", "of", "on", "so", "to", "up", "we",
    "act", "air", "ant", "bag", "bed", "box", "bus", "car", "cat", "cup", "day", "dog", "ear",
    "egg", "end", "eye", "fox", "fun", "hat", "ice", "ink", "jam", "key", "leg", "map", "net",
    "oak", "oil", "old", "pen", "pig", "red", "run", "sea", "sky", "sun", "tea", "ten", "top",
    "van", "war", "way", "wet", "yes", "zoo",
    "army", "baby", "ball", "bird", "blue", "boat", "book", "cake", "city", "coat", "door",
    "duck", "east", "face", "farm", "fish", "game", "gold", "hand", "home", "iron", "jump",
    "king", "lake", "lamp", "milk", "moon", "nose", "open", "park", "quiz", "rain", "road",
    "ship", "snow", "star", "time", "tree", "very", "wind", "wood", "year", "zero",
)  # fmt: skip


def main() -> None:
    """Writes the images and their records."""
    parser = argparse.ArgumentParser(description="Make images of printed text and shapes.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--questions", type=int, help="per image (default: 1 to 4)")
    options = parser.parse_args()
    (options.out_dir / "images").mkdir(parents=True, exist_ok=True)
    with (options.out_dir / "train.jsonl").open("w", encoding="utf-8") as file:
        for index in range(options.images):
            rng = random.Random(f"printed {options.seed} {index}")
            scene = make_scene(rng, options.kinds)
            name = f"images/{index:06}.png"
            for record in make_records(scene, name, rng, options.questions):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            draw(scene, rng).save(options.out_dir / name)


def make_scene(rng: random.Random, kinds: Sequence[str] = tuple(KINDS)) -> Scene:
    """A random scene of one of these kinds."""
    kind = rng.choices(kinds, weights=[KINDS[kind] for kind in kinds])[0]
    if kind in ("shape", "count"):
        count = rng.randint(1, 5) if kind == "count" else 1
        return Scene(kind, shape=rng.choice(SHAPES), colour=rng.choice(list(COLOURS)), count=count)
    text = {
        "digit": lambda: str(rng.randrange(10)),
        "letter": lambda: rng.choice(CAPITALS + SMALL),
        "number": lambda: "".join(str(rng.randrange(10)) for _ in range(rng.randint(2, 3))),
        "word": lambda: rng.choice((str.lower, str.upper))(rng.choice(WORDS)),
    }[kind]()
    return Scene(kind, text=text, colour=rng.choices(("dark", "light"), weights=(0.8, 0.2))[0])


def make_records(
    scene: Scene, image: str, rng: random.Random, questions: int | None = None
) -> list[dict[str, Any]]:
    """The records of an image, in some cases followed by one without an image."""
    exchanges = ask(scene, questions or rng.choice(QUESTIONS), rng)
    text_only = rng.random() < TEXT_ONLY * len(exchanges)
    if len(exchanges) > 1 and rng.random() < MULTI_TURN:
        turns = rng.randint(2, min(3, len(exchanges)))
        records = [_record(exchanges[:turns], image)]
        exchanges = exchanges[turns:]
    else:
        records = []
    records += [_record([exchange], image) for exchange in exchanges]
    if text_only:
        records.append(_record([Exchange(*rng.choice(WITHOUT_IMAGE))], None))
    return records


def _record(exchanges: list[Exchange], image: str | None) -> dict[str, Any]:
    """A record of the native layout; the image tag is at the start of the first question."""
    turns = [list(exchange) for exchange in exchanges]
    if image:
        turns[0][0] = "<image>" + turns[0][0]
    *history, (query, response) = turns
    record: dict[str, Any] = {"query": query, "response": response}
    if history:
        record["history"] = history
    if image:
        record["images"] = [image]
    return record


if __name__ == "__main__":
    main()
