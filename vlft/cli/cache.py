"""``vlft cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.console import out
from vlft.errors import VlftError
from vlft.vision.cache_plan import cache_root, clear_cache, list_cache

if TYPE_CHECKING:
    from vlft.config import CacheConfig


def run_cache(config: CacheConfig) -> None:
    """Prints the size of the cache by model, or removes all of it."""
    if config.action == "clear":
        size, problems = clear_cache()
        out.print(f"{cache_root()}: {size / 2**20:,.1f} MiB removed", markup=False)
        if problems:
            hint = "correct that, or remove what is left by hand"
            raise VlftError("; ".join(problems[:3]), place=f"{len(problems)} left", hint=hint)
        return
    rows = list_cache()
    for name, files, size in rows:
        out.print(f"{name}  {files:5} files  {size / 2**20:10,.1f} MiB")
    total = sum(size for _, _, size in rows)
    out.print(f"{cache_root()}: {total / 2**20:,.1f} MiB", markup=False)
