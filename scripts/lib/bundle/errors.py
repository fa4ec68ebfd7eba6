"""What a user of the bundle's builder can put right."""

from __future__ import annotations


class BundleError(Exception):
    """One sentence: what is wrong and what to do."""
