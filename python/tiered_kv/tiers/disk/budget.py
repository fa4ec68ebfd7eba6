"""How many bytes the files of the tier may take, and how large a segment is (pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.segment import MAX_SLOTS

# Directories, LOCK, FORMAT, an empty index and its shared-memory file, with some air.
_FIXED_BYTES = 256 << 10
# A page takes 40 bytes of an index row, up to 60 with its share of the row and of the B-tree; the
# same again while rows are packed.
_ROW_BYTES = 128
# Extent blocks and the like that a file system charges to a file.
_FILE_OVERHEAD_BYTES = 2 * BLOCK_BYTES
_SMALLEST_SEGMENT_BYTES = 256 << 10
_LARGEST_SEGMENT_BYTES = 512 << 20
_SEGMENTS = 32
_FEW_SEGMENTS = 8
_FEW_SLOTS = 8
_SEGMENTS_PER_SPARE = 24
_MOST_SPARE = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """A hard limit on everything below one directory."""

    capacity_bytes: int

    @property
    def wal_blocks(self) -> int:
        """4 KiB blocks of index log before it is folded into the index."""
        return min(max(self.capacity_bytes // (256 * BLOCK_BYTES), 32), 1000)

    @property
    def reserve_bytes(self) -> int:
        """What segments may not use."""
        return _FIXED_BYTES + self.wal_blocks * (BLOCK_BYTES + 64)

    @property
    def segment_space(self) -> int:
        return max(self.capacity_bytes - self.reserve_bytes, 0)

    def cost(self, record_bytes: int, slots: int) -> int:
        """Bytes charged for one segment: its file and its share of the index."""
        return BLOCK_BYTES + slots * (record_bytes + _ROW_BYTES) + _FILE_OVERHEAD_BYTES

    def slots_per_segment(self, record_bytes: int) -> int:
        """Slots of a new segment: 512 MiB of them, and fewer where that would be more than a 32nd
        of the budget, so that reclaim goes in small steps whatever the budget.

        Raises DiskTierError if not even two segments of one slot fit: one could never be
        reclaimed while the other is read.
        """
        space = self.segment_space
        if 2 * self.cost(record_bytes, 1) > space:
            needed = self.reserve_bytes + 2 * self.cost(record_bytes, 1)
            raise DiskTierError(
                f"The disk tier's capacity of {self.capacity_bytes} bytes is too small for pages "
                f"that take {record_bytes} bytes on disk: give it at least {needed} bytes."
            )
        target = min(max(space // _SEGMENTS, _SMALLEST_SEGMENT_BYTES), _LARGEST_SEGMENT_BYTES)
        # So large pages that survivors could hardly be told from others: rather fewer segments.
        target = max(target, min(self.cost(record_bytes, _FEW_SLOTS), space // _FEW_SEGMENTS))
        fixed = self.cost(record_bytes, 0)
        slots = (min(target, space // 2) - fixed) // (record_bytes + _ROW_BYTES)
        return min(max(slots, 1), MAX_SLOTS)

    def spare_segments(self, record_bytes: int) -> int:
        """Segments to have free ahead of need. None where one would be a large part of all: there
        segments are so small that reclaiming one takes no time."""
        cost = self.cost(record_bytes, self.slots_per_segment(record_bytes))
        return min(self.segment_space // cost // _SEGMENTS_PER_SPARE, _MOST_SPARE)
