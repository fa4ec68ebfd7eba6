"""Identifiers that cross package boundaries."""

from __future__ import annotations

import enum
from typing import TypeAlias


class Tier(enum.IntEnum):
    """A place where KV pages can live; a larger value is farther from the compute."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    STORE = 3


PageHash: TypeAlias = bytes
"""32 bytes: the chained sha256 that names one page (see `tiered_kv.forest.key`)."""

PAGE_HASH_BYTES = 32
