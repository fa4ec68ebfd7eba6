"""Prompts that arrive in pieces, for the HTTP server (`api/pieces.py`)."""
