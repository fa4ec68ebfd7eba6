"""Segment files that somebody else deleted or cut while the store is open."""

from __future__ import annotations

import bisect
import contextlib
import logging
import sqlite3
from collections.abc import Iterable

from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.segment import Segment
from tiered_kv.tiers.disk.segment_files import SegmentFiles
from tiered_kv.tiers.disk.space import SpaceManager

logger = logging.getLogger(__name__)

_LOOKS_AT_ONCE = 2_000
"""Segments; more are looked at in turn."""


class LostFiles:
    """Looks whether files are still what the catalog says, and forgets those that aren't.

    An open file outlives its name: what is written to it would be gone with the next start, and
    its blocks are free only when it is closed.
    """

    def __init__(self, catalog: Catalog, files: SegmentFiles, space: SpaceManager) -> None:
        self._catalog = catalog
        self._files = files
        self._space = space
        self._next_number = 0

    def look(self) -> None:
        """Looks at the next segments, some thousands of them; costs one system call for each."""
        numbers = sorted(self._catalog.segments)
        first = bisect.bisect_left(numbers, self._next_number)
        numbers = numbers[first : first + _LOOKS_AT_ONCE]
        self._next_number = numbers[-1] + 1 if len(numbers) == _LOOKS_AT_ONCE else 0
        self.forget(s for n in numbers if (s := self._catalog.segments.get(n)) is not None)

    def forget(self, suspects: Iterable[Segment]) -> None:
        """Give up those of these segments whose file is gone or has another size. Never raises."""
        n_segments = n_pages = 0
        for segment in {segment.number: segment for segment in suspects}.values():
            # What cannot be told, or not be noted in the index, is found out the next time.
            with contextlib.suppress(OSError, sqlite3.Error):
                if not self._files.is_whole(segment):
                    n_forgotten = self._space.forget_lost(segment)
                    n_segments += n_forgotten is not None
                    n_pages += n_forgotten or 0
        if n_segments:
            logger.warning(
                "Disk tier: %d segment files were deleted or cut by somebody else: %d pages are "
                "forgotten.",
                n_segments,
                n_pages,
            )
