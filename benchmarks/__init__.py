"""Measurements behind docs/performance.md; nothing of vlft imports them."""
