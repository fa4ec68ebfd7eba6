"""Where pages start: host slots and disk records alike, as O_DIRECT wants it."""

from __future__ import annotations

ALIGNMENT_BYTES = 4096


def round_up(n_bytes: int) -> int:
    """The next multiple of ALIGNMENT_BYTES."""
    return (n_bytes + ALIGNMENT_BYTES - 1) & -ALIGNMENT_BYTES
