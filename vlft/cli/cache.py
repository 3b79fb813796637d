"""``vlft cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.console import out
from vlft.data.image_cache import KEPT, clear_kept, size_of_cache
from vlft.errors import VlftError
from vlft.vision.cache_plan import cache_root, clear_cache, list_cache

if TYPE_CHECKING:
    from vlft.config import CacheConfig


def run_cache(config: CacheConfig) -> None:
    """Prints the size of the cache by model, or removes all of it."""
    kept = {name: size_of_cache(name) for name in KEPT}
    kept_bytes = sum(size for _, size in kept.values())
    if config.action == "clear":
        size, problems = clear_cache()
        problems += (problem for name in KEPT for problem in clear_kept(name))
        size += kept_bytes
        out.print(f"{cache_root().parent}: {size / 2**20:,.1f} MiB removed", markup=False)
        if problems:
            hint = "correct that, or remove what is left by hand"
            raise VlftError("; ".join(problems[:3]), place=f"{len(problems)} left", hint=hint)
        return
    rows = list_cache()
    listed = [*rows, *((name, files, size) for name, (files, size) in kept.items() if files)]
    for name, files, size in listed:
        what = "file " if files == 1 else "files"
        out.print(f"{name:32}  {files:5} {what}  {size / 2**20:10,.1f} MiB")
    total = kept_bytes + sum(size for _, _, size in rows)
    out.print(f"{cache_root().parent}: {total / 2**20:,.1f} MiB", markup=False)
