"""Readers of recorded traces; a bad file gives one sentence with the line number."""
