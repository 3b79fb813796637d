"""Model, adapter and run folders: found, read, written."""
