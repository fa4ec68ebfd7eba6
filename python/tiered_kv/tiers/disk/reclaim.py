"""Which segment to give up, and which of its pages deserve a second chance (pure policy)."""

from __future__ import annotations

from collections.abc import Iterable

from tiered_kv.tiers.disk.segment import Segment

MOVED_FRACTION = 0.25
"""At most this share of a segment's slots is carried over: bounds write amplification to 4/3."""


def segment_value(segment: Segment, base: int) -> int:
    """Live pages, each weighted by how much later than `base` it was used last."""
    return segment.access_sum - segment.live * base


def choose_victim(candidates: Iterable[Segment], now: int) -> Segment | None:
    """The segment with the least live value; of equals the one that was made first.

    `now` is in units of `Segment.access`. Weights run from 1 for a page used now down to 1/9 for
    the mean page of the least recently used segment: old pages count for little, not for nothing,
    so that of two equally old segments the one with fewer live pages goes.
    """
    segments = list(candidates)
    if not segments:
        return None
    means = [s.access_sum // s.live for s in segments if s.live]
    oldest = min(means, default=now)
    base = oldest - (now - oldest) // 8
    return min(segments, key=lambda s: (segment_value(s, base), s.number))


def choose_survivors(victim: Segment, room: int) -> list[int]:
    """Slots of the pages to carry over: read since they were written or moved, latest first.

    `room`: free slots where they could go. Half of it stays free for new pages.
    """
    limit = min(int(victim.slots * MOVED_FRACTION), room // 2)
    read_slots = [
        slot
        for slot, page_hash in enumerate(victim.page_hashes)
        if page_hash is not None and victim.access[slot] & 1
    ]
    read_slots.sort(key=victim.access.__getitem__, reverse=True)
    return sorted(read_slots[:limit])
