"""``vlft infer``."""
