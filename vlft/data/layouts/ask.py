"""What a record leaves open is asked, with the flag that decides it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vlft.data.layouts.fields import Fields


class LayoutError(DataError):
    """The columns of a record do not say how to read it; asked once for a file.

    Attributes:
        columns: of the record.
    """

    def __init__(self, found: str, fields: Fields, hint: str) -> None:
        self.found = found
        self.columns = list(fields.values)
        super().__init__(with_columns(found, self.columns), hint=hint)


def with_columns(found: str, columns: Iterable[str]) -> str:
    """What was found, and the names of the columns."""
    names = [name if name == name.strip() else repr(name) for name in columns]
    listed = ", ".join(name[:60] for name in names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{found} (columns: {listed})" if names else found
