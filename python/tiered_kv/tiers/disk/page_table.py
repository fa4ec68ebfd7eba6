"""A map from 64-bit keys to locations in flat arrays: 16 bytes a cell, where a dict takes 150.

Keys are spread over 256 shards by their top byte. Each is a table of open addressing that is built
anew on its own when it fills up, so that growing never takes more than a few milliseconds, however
many keys there are. `get` takes no lock and may run beside a change: a cell's key never changes
while its arrays are in use, and new arrays take the place of old ones in one step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

_SHARD_SHIFT = 56
_SHARDS = 256
# The bits behind those of the shard choose the cell: so keys in order go to cells in order.
_CELL_SHIFT = 24
_CELL_BITS = 32
_CELL_MASK = (1 << _CELL_BITS) - 1
_LOAD_WHEN_BUILT = 0.45
_LOAD_WHEN_FULL = 0.66
_PAD_CELLS = 32
"""Cells behind the last place where a probe can begin: probing goes to the right, never round."""

# Values of a cell that are not a location + _FIRST.
_EMPTY = 0
_GONE = 1
_FIRST = 2


class _Shard:
    """Cells of the keys with one top byte."""

    __slots__ = ("arrays", "live", "most", "used")

    def __init__(self, keys: Keys, cells: Keys) -> None:
        """`cells`: location + _FIRST of each key; keys are distinct and in ascending order."""
        self.live = self.used = len(keys)
        size = max(int(len(keys) / _LOAD_WHEN_BUILT), 8)
        self.most = int(size * _LOAD_WHEN_FULL)
        chosen = (keys >> np.uint64(_CELL_SHIFT)) & np.uint64(_CELL_MASK)
        start = (chosen * np.uint64(size)) >> np.uint64(_CELL_BITS)
        # Where linear probing puts the n-th key: behind its predecessor at least.
        nth = np.arange(len(keys), dtype=np.int64)
        at = np.maximum.accumulate(start.astype(np.int64) - nth) + nth
        length = max(size, int(at[-1]) + 1 if len(at) else 0) + _PAD_CELLS
        new_keys = np.zeros(length, np.uint64)
        new_cells = np.zeros(length, np.uint64)
        new_keys[at] = keys
        new_cells[at] = cells
        # Single items of a memoryview are read and written much faster than those of an array.
        self.arrays = (new_keys.data, new_cells.data, size)

    def grown(self) -> _Shard:
        """A shard with the same keys and room for more."""
        keys, cells = (np.frombuffer(view, np.uint64) for view in self.arrays[:2])
        is_live = cells >= _FIRST
        keys, cells = keys[is_live], cells[is_live]
        order = np.argsort(keys)
        return _Shard(keys[order], cells[order])

    def find(self, key: int) -> int:
        """The cell of this key, or the empty one where it would go."""
        keys, cells, size = self.arrays
        at = ((key >> _CELL_SHIFT & _CELL_MASK) * size) >> _CELL_BITS
        while cells[at] != _EMPTY and keys[at] != key:
            at += 1
        return at


_NOTHING = np.zeros(0, np.uint64)


class PageTable:
    """Key (0 to 2**64 - 1) -> location (0 to 2**63). Changes need a lock of the caller's."""

    def __init__(self) -> None:
        self._shards: list[_Shard | None] = [None] * _SHARDS

    @classmethod
    def build(
        cls, keys: Keys, locations: Keys, is_newer: Callable[[int, int], bool]
    ) -> tuple[PageTable, list[int]]:
        """A table of many keys, and the locations left out because their key is there twice.

        is_newer: of two locations of one key, is the second to be kept?
        """
        table = cls()
        left_out: list[int] = []
        shards = (keys >> np.uint64(_SHARD_SHIFT)).astype(np.uint8)
        # Of single bytes this is a radix sort, many times faster than sorting the keys at once.
        order = np.argsort(shards, kind="stable")
        bounds = [0, *np.cumsum(np.bincount(shards, minlength=_SHARDS)).tolist()]
        for number in range(_SHARDS):
            chosen = order[bounds[number] : bounds[number + 1]]
            if len(chosen):
                chosen = chosen[np.argsort(keys[chosen])]
                some, there, old = _without_repeats(keys[chosen], locations[chosen], is_newer)
                table._shards[number] = _Shard(some, there + np.uint64(_FIRST))
                left_out += old
        return table, left_out

    def __len__(self) -> int:
        return sum(shard.live for shard in self._shards if shard is not None)

    def dispose(self) -> bool:
        """Give some memory back; False if there is none left. Of no use after that."""
        if self._shards:
            self._shards.pop()
        return bool(self._shards)

    def get(self, key: int) -> int | None:
        """The location of a key; never waits."""
        shard = self._shards[key >> _SHARD_SHIFT]
        if shard is None:
            return None
        keys, cells, size = shard.arrays
        at = ((key >> _CELL_SHIFT & _CELL_MASK) * size) >> _CELL_BITS
        while (cell := cells[at]) != _EMPTY:
            if keys[at] == key:
                return cell - _FIRST if cell >= _FIRST else None
            at += 1
        return None

    def put(self, key: int, location: int) -> None:
        """Set or change a key's location."""
        number = key >> _SHARD_SHIFT
        shard = self._shards[number]
        if shard is None:
            shard = self._shards[number] = _Shard(_NOTHING, _NOTHING)
        at = shard.find(key)
        keys, cells, _ = shard.arrays
        if cells[at] == _EMPTY:
            # The last cell stays empty: there every probe ends.
            if shard.used >= shard.most or at == len(cells) - 1:
                shard = self._shards[number] = shard.grown()
                at = shard.find(key)
                keys, cells, _ = shard.arrays
            # In this order: who finds the cell taken may read its key.
            keys[at] = key
            shard.used += 1
            shard.live += 1
        elif cells[at] == _GONE:
            shard.live += 1
        cells[at] = location + _FIRST

    def remove(self, key: int) -> None:
        """Forget a key; harmless if it is not there."""
        shard = self._shards[key >> _SHARD_SHIFT]
        if shard is None:
            return
        at = shard.find(key)
        cells = shard.arrays[1]
        if cells[at] >= _FIRST:
            cells[at] = _GONE
            shard.live -= 1


def _without_repeats(
    keys: Keys, locations: Keys, is_newer: Callable[[int, int], bool]
) -> tuple[Keys, Keys, list[int]]:
    """Keys in ascending order, each once, with their locations; and the locations left out."""
    repeats = np.flatnonzero(keys[1:] == keys[:-1])
    if not len(repeats):
        return keys, locations, []
    left_out: list[int] = []
    keep = np.ones(len(keys), bool)
    for at in repeats.tolist():
        first, second = int(locations[at]), int(locations[at + 1])
        keep[at] = False
        if is_newer(first, second):
            left_out.append(first)
        else:
            left_out.append(second)
            locations[at + 1] = first
    return keys[keep], locations[keep], left_out
