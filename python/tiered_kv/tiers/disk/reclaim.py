"""Which segment to give up, and which of its pages deserve a second chance (pure policy)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tiered_kv.tiers.disk.ages import Ages
from tiered_kv.tiers.disk.segment import Segment, reserved_slots
from tiered_kv.tiers.disk.segment_board import SegmentBoard


def choose_victim(
    board: SegmentBoard, others: Iterable[Segment], ages: Ages, now: int
) -> Segment | None:
    """The segment with the least live value per byte; of equals the one filled longest ago.

    A page used `age` ago is worth tau / (tau + age), where tau is the mean age of all pages: 1 for
    a page used now, 1/2 at the mean age, and never nothing, so that of two segments of one age the
    one with fewer live pages goes. Ages are those of the epochs in which segments count their
    pages, so this looks at no page. `now` is the logical time.

    board: all segments that are full; others: more candidates, a few.
    """
    age = ages.mean_ages(now)
    others = list(others)
    totals = board.totals() + sum(np.array(segment.counts, np.int64) for segment in others)
    n_pages = totals.sum()
    tau = max(float(totals @ age) / n_pages, 1.0) if n_pages else 1.0
    worth = tau / (tau + age)
    least = board.least(worth)
    best = [] if least is None else [least]
    for segment in others:
        value = float(np.array(segment.counts) @ worth) * segment.page_share
        best.append((value, segment.filled_at, segment.number, segment))
    return min(best, key=lambda each: each[:3])[3] if best else None


def choose_survivors(victim: Segment, room: int) -> list[int]:
    """Slots of the pages to carry over: read since they were written or moved, latest first.

    `room`: free slots where they could go.
    """
    access = victim.access
    slots = np.flatnonzero(access & np.uint64(1))
    limit = min(reserved_slots(victim.slots), room)
    if len(slots) > limit:
        latest_first = np.argsort(-(access[slots].astype(np.int64)), kind="stable")
        slots = np.sort(slots[latest_first[:limit]])
    survivors: list[int] = slots.tolist()
    return survivors
