"""How many bytes the files of the tier may take, and how large a segment is (pure arithmetic)."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.segment import MAX_SLOTS

# Directories, LOCK, FORMAT, an empty index and its shared-memory file, with some air.
_FIXED_BYTES = 256 << 10
# One index row costs about 55 bytes in the B-tree; the same again while it is in the log.
_ROW_BYTES = 128
# Extent blocks and the like that a file system charges to a file.
_FILE_OVERHEAD_BYTES = 2 * BLOCK_BYTES
_SMALLEST_SEGMENT_BYTES = 256 << 10
_LARGEST_SEGMENT_BYTES = 1 << 30
_SEGMENTS = 16
_MANY_SEGMENTS = 256


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
        """Slots of a new segment: about a 16th of the budget, so that reclaim goes in small steps.

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
        target = min(max(target, space // _MANY_SEGMENTS), space // 2)
        fixed = self.cost(record_bytes, 0)
        slots = (target - fixed) // (record_bytes + _ROW_BYTES)
        return min(max(slots, 1), MAX_SLOTS)
