"""Scores of replies against the right texts, with intervals, and a base against a tuned model."""
