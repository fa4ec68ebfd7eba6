"""Which segment to give up, and which of its pages deserve a second chance (pure policy)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tiered_kv.tiers.disk.ages import N_COUNTS, Ages
from tiered_kv.tiers.disk.segment import Segment, reserved_slots


def choose_victim(candidates: Iterable[Segment], ages: Ages, now: int) -> Segment | None:
    """The segment with the least live value per byte; of equals the one filled longest ago.

    A page used `age` ago is worth tau / (tau + age), where tau is the mean age of all candidates'
    pages: 1 for a page used now, 1/2 at the mean age, and never nothing, so that of two segments of
    one age the one with fewer live pages goes. Ages are those of the epochs in which segments count
    their pages, so this looks at no page. `now` is the logical time.
    """
    segments = sorted(candidates, key=lambda s: (s.filled_at, s.number))
    if not segments:
        return None
    counts = np.frombuffer(b"".join(s.counts for s in segments), np.int32)
    counts = counts.reshape(len(segments), N_COUNTS)
    age = ages.mean_ages(now)
    n_pages = counts.sum()
    tau = max(float(counts.sum(axis=0) @ age) / n_pages, 1.0) if n_pages else 1.0
    share = np.array([s.record_bytes / s.file_bytes for s in segments], np.float64)
    return segments[int(np.argmin(counts @ (tau / (tau + age)) * share))]


def choose_survivors(victim: Segment, room: int) -> list[int]:
    """Slots of the pages to carry over: read since they were written or moved, latest first.

    `room`: free slots where they could go.
    """
    access = victim.accesses()
    slots = np.flatnonzero(access & np.uint64(1))
    limit = min(reserved_slots(victim.slots), room)
    if len(slots) > limit:
        latest_first = np.argsort(-(access[slots].astype(np.int64)), kind="stable")
        slots = np.sort(slots[latest_first[:limit]])
    survivors: list[int] = slots.tolist()
    return survivors
