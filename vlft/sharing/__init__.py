"""Adapters and models on a hub, with a card that says how they were made."""
