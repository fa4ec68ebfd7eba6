"""Flags, their values, and what is refused."""
