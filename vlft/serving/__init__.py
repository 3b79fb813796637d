"""``vlft serve`` and ``vlft app``: models behind OpenAI's API, and a page that asks them."""
