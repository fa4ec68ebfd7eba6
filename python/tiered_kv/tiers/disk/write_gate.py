"""Degradation: after a failed write the tier stops writing for a while, then tries again."""

from __future__ import annotations

import time
from collections.abc import Callable

from tiered_kv.tiers.gate import Gate


class WriteGate(Gate):
    """Of the disk tier called `name`; see `Gate`."""

    def __init__(
        self, name: str, now: Callable[[], float] = time.monotonic, *, read_only: bool = False
    ) -> None:
        name = name.replace("%", "%%")
        closes = (
            f"Disk tier {name} stops writing because of an error (%s); reads go on, and writes are "
            "tried again by themselves."
        )
        opens = f"Disk tier {name} writes again after %.1f s."
        super().__init__(closes, opens, now, read_only=read_only)
