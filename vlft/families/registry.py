"""The families that vlft knows. A new one is a file beside this one and a row in this table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlft.errors import CheckpointError
from vlft.families import (
    deepseek_ocr,
    deepseek_ocr2,
    deepseek_vl,
    deepseek_vl2,
    deepseek_vl_hybrid,
    janus,
    unlimited_ocr,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vlft.families.base import Family

FAMILIES: tuple[Family, ...] = (
    deepseek_vl.FAMILY,
    deepseek_vl_hybrid.FAMILY,
    deepseek_vl2.FAMILY,
    janus.FAMILY,
    deepseek_ocr.FAMILY,
    deepseek_ocr2.FAMILY,
    unlimited_ocr.FAMILY,
)


def family_of(model: Any) -> Family:
    """The family of a model in memory."""
    name, config = type(model).__name__, model.config.to_dict()
    of_class = (family for family in FAMILIES if family.class_name.endswith(f":{name}"))
    return next(family for family in of_class if family.matches_native(config))


def _layout(family: Family, config: Mapping[str, Any]) -> str | None:
    """The layout of a config.json if it is of this family, otherwise None."""
    layout = family.model_types.get(str(config.get("model_type")))
    # Unlimited-OCR has the same model_type in both layouts, but for a hyphen.
    if layout == "transformers" and "language_config" in config:
        layout = "original"
    matches = family.matches if layout == "original" else family.matches_native
    return layout if layout and matches(config) else None


def find_family(config: Mapping[str, Any], *, place: str) -> tuple[Family, str]:
    """The family of a config.json, and the layout of its folder, original or transformers.

    Raises:
        CheckpointError: no family matches, or several; the message says what was found and what is
            supported.
    """
    try:
        found = [(family, layout) for family in FAMILIES if (layout := _layout(family, config))]
    except CheckpointError as error:
        raise CheckpointError(error.message, place=place, hint=error.hint) from None
    if len(found) == 1:
        return found[0]
    if found:
        titles = " and ".join(family.title for family, _ in found)
        raise CheckpointError(
            f"not one model: has the marks of {titles}",
            place=place,
            hint="compare its config.json with the published one",
        )
    known = "; ".join(
        f"{family.title}: model_type {' or '.join(map(repr, family.model_types))}"
        for family in FAMILIES
    )
    keys = ", ".join(sorted(config)[:12])
    marks = f"model_type {config.get('model_type')!r}"
    if config.get("architectures"):
        marks += f", architectures {config['architectures']!r}"
    raise CheckpointError(
        f"not a supported model: found {marks} and the keys {keys}",
        place=place,
        hint=f"supported are: {known}",
    )
