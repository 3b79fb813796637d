"""``vlft serve``: models behind OpenAI's API."""
