"""Which segment to give up, and which of its pages deserve a second chance (pure policy)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from tiered_kv.tiers.disk.segment import Segment, reserved_slots


def choose_victim(candidates: Iterable[Segment], now: int) -> Segment | None:
    """The segment with the least live value per byte; of equals the one that was made first.

    A page used `age` ago is worth tau / (tau + age), where tau is the mean age of all candidates'
    pages: 1 for a page used now, 1/2 at the mean age, and never nothing, so that of two segments of
    one age the one with fewer live pages goes. `now` is in units of `Segment.access`.
    """
    segments = list(candidates)
    if not segments:
        return None
    ages = [_live_ages(segment, now) for segment in segments]
    n_pages = sum(len(a) for a in ages)
    tau = max(sum(float(a.sum()) for a in ages) / n_pages, 1.0) if n_pages else 1.0
    values = [
        float((tau / (tau + age)).sum()) * segment.record_bytes / segment.file_bytes
        for segment, age in zip(segments, ages, strict=True)
    ]
    return min(zip(values, segments, strict=True), key=lambda vs: (vs[0], vs[1].number))[1]


def _live_ages(segment: Segment, now: int) -> npt.NDArray[np.float64]:
    access = np.frombuffer(segment.access, dtype=np.uint64).astype(np.float64)
    return np.maximum(now - access[access > 0], 0.0)


def choose_survivors(victim: Segment, room: int) -> list[int]:
    """Slots of the pages to carry over: read since they were written or moved, latest first.

    `room`: free slots where they could go.
    """
    limit = min(reserved_slots(victim.slots), room)
    read_slots = [
        slot
        for slot, page_hash in enumerate(victim.page_hashes)
        if page_hash is not None and victim.access[slot] & 1
    ]
    read_slots.sort(key=victim.access.__getitem__, reverse=True)
    return sorted(read_slots[:limit])
