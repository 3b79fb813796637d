"""The page of ``vlft app``: one file, which loads nothing and asks this server alone."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@functools.cache
def read_page() -> tuple[str, str]:
    """The page, and what a browser may do with it.

    Scripts and styles are known by their hashes: text of a model could not run a script even if the
    page put it in the wrong place.
    """
    page = (Path(__file__).parent / "page.html").read_text("utf-8")
    return page, (
        f"default-src 'none'; script-src {_hashes(page, 'script')}; "
        f"style-src {_hashes(page, 'style')}; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> str:
    """The hashes of all scripts or styles."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
