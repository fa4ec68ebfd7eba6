"""Checkpoints of recurrent state on disk: records of their own beside those of pages.

A checkpoint is kept under the name of the page at whose end it was taken, in a namespace that says
what the states are. It may be larger than what a segment of the disk takes, so it is cut into equal
parts; what cannot be read back whole, with the checksums of all parts, is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tiered_kv.core.ids import PageHash
from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.cold.local_pages import LocalPages

#: Most bytes of a part.
PART_BYTES_MAX = 4 << 20


class StateLayout:
    """How a state of `n_bytes` lies in memory and on disk: parts, each whole blocks of 4096."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.n_parts = -(-n_bytes // PART_BYTES_MAX)
        self.part_bytes = round_up(-(-n_bytes // self.n_parts))
        self.slot_bytes = self.n_parts * self.part_bytes
        """What a state takes in memory."""

    def names(self, name: PageHash) -> list[PageHash]:
        """Of its parts: the first goes by the page's own."""
        more = (hashlib.sha256(name + bytes([part])).digest() for part in range(1, self.n_parts))
        return [name, *more]

    def views(self, slot: npt.NDArray[np.uint8]) -> list[memoryview]:
        return [part.data for part in slot.reshape(self.n_parts, self.part_bytes)]


class StateStore:
    """pages: a namespace of the disk, for records of `layout.part_bytes`."""

    def __init__(self, pages: LocalPages, layout: StateLayout) -> None:
        self._pages = pages
        self._layout = layout

    def __contains__(self, name: PageHash) -> bool:
        """Whether its first part is there; a lookup in memory. The rest shows when it is read."""
        return self._pages.contains(name)

    def put(self, name: PageHash, slot: npt.NDArray[np.uint8]) -> None:
        self._pages.write_pages(self._layout.names(name), self._layout.views(slot))

    def get(self, name: PageHash, slot: npt.NDArray[np.uint8]) -> bool:
        """Fills `slot`; False if that checkpoint is not there, or not as it was stored."""
        names: Sequence[PageHash] = self._layout.names(name)
        return self._pages.read_pages(names, self._layout.views(slot)) == len(names)

    def drop(self, names: Sequence[PageHash]) -> int:
        """Forgets checkpoints; returns how many records there were."""
        return self._pages.drop_pages([part for name in names for part in self._layout.names(name)])
