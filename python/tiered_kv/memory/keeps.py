"""What an administrator wants to stay where it is, until when, and how much of that there may be.

A keep is a wish with an end. It covers pages of one tier by their names, for one tenant, within
bounds that its giver says: those of the tenant and those of all together. It never takes memory
from who runs: what is kept goes last, but it goes (`keep_filter.py`).

Pure; all times are the caller's. Equal calls in equal order give equal keeps, on every rank.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tiered_kv.core.ids import PageHash, Tier

#: Where something can be kept.
KEEP_TIERS = (Tier.HOST, Tier.DISK)
#: Pages that are looked at in one call when keeps end: a moment of the scheduler's thread.
ENDED_PAGES = 512


@dataclass(frozen=True, slots=True)
class KeepBounds:
    """Most pages of a tier that keeps may cover."""

    all_pages: int
    tenant_pages: int


@dataclass(slots=True)
class _Kept:
    """Of one tier."""

    until_s: dict[PageHash, dict[str, float]] = field(default_factory=dict)
    """By page and tenant."""
    n_pages: Counter[str] = field(default_factory=Counter)
    """By tenant."""
    n_released: int = 0


class Keeps:
    """Kept pages by tier. O(1) for each page, and O(log grants) to end one."""

    def __init__(self) -> None:
        self._kept = {tier: _Kept() for tier in KEEP_TIERS}
        # (end, number, tier, tenant, pages), the next to end first.
        self._ends: list[tuple[float, int, Tier, str, tuple[PageHash, ...]]] = []
        self._numbers = itertools.count()
        self.given_up_pages: Counter[Tier] = Counter()
        """Kept pages that made way since the start, as there was nothing else left."""

    def __bool__(self) -> bool:
        return bool(self._ends)

    def grant(
        self,
        tier: Tier,
        tenant: str,
        hashes: Sequence[PageHash],
        until_s: float,
        bounds: KeepBounds,
    ) -> int:
        """Keeps the leading of these pages that the bounds have room for; returns how many.

        For pages that the tenant keeps already the new end counts, also if it is earlier.
        """
        kept = self._kept[tier]
        taken: list[PageHash] = []
        for page_hash in hashes:
            ends = kept.until_s.get(page_hash)
            if ends is None or tenant not in ends:
                if kept.n_pages[tenant] >= bounds.tenant_pages:
                    break
                if ends is None:
                    if len(kept.until_s) >= bounds.all_pages:
                        break
                    ends = kept.until_s[page_hash] = {}
                kept.n_pages[tenant] += 1
            ends[tenant] = until_s
            taken.append(page_hash)
        for part in _parts(taken):
            heapq.heappush(self._ends, (until_s, next(self._numbers), tier, tenant, part))
        return len(taken)

    def release(self, tier: Tier, hashes: Sequence[PageHash], tenant: str | None = None) -> int:
        """Keeps these pages no longer for that tenant, or for any; returns how many were."""
        kept = self._kept[tier]
        n_released = 0
        for page_hash in hashes:
            tenants = list(kept.until_s.get(page_hash, ())) if tenant is None else [tenant]
            are_forgotten = [_forget(kept, page_hash, one) for one in tenants]
            n_released += True in are_forgotten
        return n_released

    def end(self, now_s: float) -> None:
        """Time goes on: what has ended is kept no longer, some of it in each call."""
        if not self._ends or self._ends[0][0] > now_s:
            return
        _, _, tier, tenant, hashes = heapq.heappop(self._ends)
        kept = self._kept[tier]
        for page_hash in hashes:
            # It may have been prolonged, or released and kept anew, since.
            if kept.until_s.get(page_hash, {}).get(tenant, now_s + 1.0) <= now_s:
                _forget(kept, page_hash, tenant)

    def until_s(self, tier: Tier, page_hash: PageHash) -> float | None:
        """When the last keep of a page ends; None if there is none."""
        kept = self._kept.get(tier)
        ends = None if kept is None else kept.until_s.get(page_hash)
        return None if not ends else max(ends.values())

    def pages(self, tier: Tier) -> list[PageHash]:
        """All that are kept there."""
        return list(self._kept[tier].until_s)

    def n_pages(self, tier: Tier) -> int:
        """How many are."""
        kept = self._kept.get(tier)
        return 0 if kept is None else len(kept.until_s)

    def n_released(self, tier: Tier) -> int:
        """A number that grows whenever a page is kept no longer."""
        kept = self._kept.get(tier)
        return 0 if kept is None else kept.n_released

    def tenants(self, tier: Tier) -> Mapping[str, int]:
        """How many pages each tenant keeps; a page that several keep counts for each."""
        return self._kept[tier].n_pages

    def gave_way(self, tier: Tier, page_hash: PageHash, n_pages: int) -> None:
        """Pages up to this one left the tier for want of anything else."""
        if self.until_s(tier, page_hash) is not None:
            self.given_up_pages[tier] += n_pages


def _forget(kept: _Kept, page_hash: PageHash, tenant: str) -> bool:
    ends = kept.until_s.get(page_hash)
    if ends is None or ends.pop(tenant, None) is None:
        return False
    kept.n_pages[tenant] -= 1
    if not kept.n_pages[tenant]:
        del kept.n_pages[tenant]
    if not ends:
        del kept.until_s[page_hash]
        kept.n_released += 1
    return True


def _parts(hashes: Sequence[PageHash]) -> list[tuple[PageHash, ...]]:
    return [tuple(hashes[at : at + ENDED_PAGES]) for at in range(0, len(hashes), ENDED_PAGES)]
