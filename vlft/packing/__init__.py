"""Samples to rows, rows to steps."""
