"""``vlft cache``."""

from __future__ import annotations

import typer

from vlft import console

HELP = "Show or clear the kept features of images."

app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False)


@app.command("info", help="List what is kept, and where.")
def info() -> None:
    """Prints the folder, and each model's part of it."""
    from vlft.vision.cache_plan import cache_root, list_cache

    rows = list_cache()
    for name, files, size in rows:
        console.out.print(f"{name}  {files:5} files  {size / 2**20:10,.1f} MiB")
    total = sum(size for _, _, size in rows)
    console.out.print(f"{cache_root()}: {total / 2**20:,.1f} MiB", markup=False)


@app.command("clear", help="Remove all of it; the next run encodes its images again.")
def clear() -> None:
    """Removes everything that is kept."""
    from vlft.vision.cache_plan import cache_root, clear_cache

    size = clear_cache()
    console.out.print(f"{cache_root()}: {size / 2**20:,.1f} MiB removed", markup=False)
