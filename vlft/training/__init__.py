"""``vlft sft``."""
