"""Samples and images that the data hold more than once, or in training and validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlft.data.conversation import ImageFacts
from vlft.data.items import text_hash
from vlft.data.looks import alike
from vlft.errors import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from vlft.data.items import Items
    from vlft.data.source import ReadFile

# Examples that a report lists of each finding.
EXAMPLES = 5


@dataclass(frozen=True)
class Contents:
    """What some data files hold, by content.

    Attributes:
        samples: hash of texts and images -> items and index of the first sample with them.
        images: SHA-256 -> the files that hold it, in order, as a set.
        looks: SHA-256 -> what the image looks like.
        repeated: samples that equal an earlier one: items, index and hash.
    """

    samples: dict[int, tuple[Items, int]] = field(default_factory=dict)
    images: dict[str, dict[Path, None]] = field(default_factory=dict)
    looks: dict[str, bytes] = field(default_factory=dict)
    repeated: list[tuple[Items, int, int]] = field(default_factory=list)

    def duplicates(self) -> dict[str, Any]:
        """Equal samples, and images under several names, as JSON values."""
        copies = [list(paths) for paths in self.images.values() if len(paths) > 1]
        return {
            "samples": len(self.repeated),
            "sample_examples": [
                {"sample": _place(items, index), "equals": _place(*self.samples[key])}
                for items, index, key in self.repeated[:EXAMPLES]
            ],
            "images": len(copies),
            "image_files": sum(map(len, copies)),
            "image_examples": [list(map(str, paths[:EXAMPLES])) for paths in copies[:EXAMPLES]],
        }


def contents_of(files: Iterable[ReadFile]) -> Contents:
    """What data files hold, by content."""
    made = Contents()
    for file in files:
        items = file.items
        for index, key in enumerate(_keys(items)):
            if key in made.samples:
                made.repeated.append((items, index, key))
            else:
                made.samples[key] = (items, index)
        for path, facts in _used_facts(items):
            made.images.setdefault(facts.digest, {})[path] = None
            made.looks[facts.digest] = facts.look
    return made


def leaks(train: Contents, validation: Sequence[ReadFile]) -> dict[str, Any]:
    """Validation samples that are trained on, or whose images are, as JSON values."""
    samples: list[dict[str, str]] = []
    shown_images: dict[str, tuple[Path, bytes]] = {}
    images: dict[str, dict[str, str]] = {}
    count = shown_count = 0
    for file in validation:
        items = file.items
        shown_images |= {facts.digest: (path, facts.look) for path, facts in _used_facts(items)}
        known = {p: f.digest for p, f in _used_facts(items) if f.digest in train.images}
        numbers = [number for number, path in enumerate(items.paths) if path in known]
        places = np.flatnonzero(np.isin(np.asarray(items.columns.images), numbers))
        owners = np.searchsorted(np.asarray(items.columns.ends), places, side="right")
        shown_count += len(np.unique(owners))
        for path, digest in known.items():
            trained = next(iter(train.images[digest]))
            images.setdefault(digest, {"image": str(path), "equals": str(trained)})
        for index, key in enumerate(_keys(items)):
            if key in train.samples:
                count += 1
                if len(samples) < EXAMPLES:
                    other = _place(*train.samples[key])
                    samples.append({"sample": _place(items, index), "equals": other})
    return {
        "samples": count,
        "sample_examples": samples,
        "images": len(images),
        "samples_with_images": shown_count,
        "image_examples": list(images.values())[:EXAMPLES],
        **_alike(train, shown_images),
    }


def _alike(train: Contents, shown_images: Mapping[str, tuple[Path, bytes]]) -> dict[str, Any]:
    """Images by SHA-256 that look like ones that are trained on, and are not the same."""
    new = [image for digest, image in shown_images.items() if digest not in train.images]
    trained = [(next(iter(paths)), train.looks[digest]) for digest, paths in train.images.items()]
    pairs = list(alike([look for _, look in new], [look for _, look in trained]))
    return {
        "images_alike": len(pairs),
        "alike_examples": [
            {"image": str(new[one][0]), "looks_like": str(trained[other][0])}
            for one, other in pairs[:EXAMPLES]
        ],
    }


def lines_of_duplicates(found: dict[str, Any]) -> Iterator[str]:
    """The duplicates for people."""
    if found.get("samples"):
        first = found["sample_examples"][0]
        samples = (
            "1 sample equals" if found["samples"] == 1 else f"{found['samples']} samples equal"
        )
        yield f"{samples} an earlier one (the first: {first['sample']} equals {first['equals']})"
    if found.get("images"):
        names = ", ".join(map(shown, found["image_examples"][0]))
        images = "1 image has" if found["images"] == 1 else f"{found['images']} images have"
        yield f"{images} several names, {found['image_files']} in all (the first: {names})"


def lines_of_leaks(found: dict[str, Any]) -> Iterator[str]:
    """What training and validation have in common, for people."""
    if found.get("samples"):
        first = found["sample_examples"][0]
        number = "1 is a training sample" if found["samples"] == 1 else (
            f"{found['samples']} are training samples"
        )  # fmt: skip
        yield f"validation: {number} too (the first: {first['sample']} equals {first['equals']})"
    if found.get("images"):
        first = found["image_examples"][0]
        names = f"{shown(first['image'])} equals {shown(first['equals'])}"
        images = "1 image is" if found["images"] == 1 else f"{found['images']} images are"
        owners = found["samples_with_images"]
        samples = "1 sample" if owners == 1 else f"{owners} samples"
        yield f"validation: {images} trained on too, in {samples} (the first: {names})"
    if found.get("images_alike"):
        first, count = found["alike_examples"][0], found["images_alike"]
        names = f"{shown(first['image'])} looks like {shown(first['looks_like'])}"
        images = "1 image looks like one that is" if count == 1 else (
            f"{count} images look like ones that are"
        )  # fmt: skip
        yield f"validation: {images} trained on, in another file (the first: {names})"


def _keys(items: Items) -> Iterator[int]:
    """For each sample a hash that is equal for samples with the same texts, boxes and images."""
    digests = dict(enumerate(_digests(items)))
    columns, boxed, start = items.columns, set(items.with_boxes), 0
    for index, end in enumerate(columns.ends):
        # The hash of a column knows boxes as given; equal ones may be given in other units.
        text = text_hash(items.conversation(index)) if index in boxed else columns.text[index]
        yield hash((text, *(digests[image] for image in columns.images[start:end])))
        start = end


def _digests(items: Items) -> Iterator[str | None]:
    """SHA-256 of the images by number; None of one that cannot be used."""
    for path in items.paths:
        found = items.inspected.get(path)
        yield found.digest if isinstance(found, ImageFacts) else None


def _used_facts(items: Items) -> Iterator[tuple[Path, ImageFacts]]:
    """Path and facts of the distinct files that the samples show, in order."""
    for number in np.unique(np.asarray(items.columns.images, np.int32)).tolist():
        yield items.paths[number], items.facts(number)


def _place(items: Items, index: int) -> str:
    return str(items.given(index).place)
