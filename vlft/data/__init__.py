"""Data files to encoded samples."""
