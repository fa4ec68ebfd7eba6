"""Finding out which pages of a prompt the cold stores have."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import page_hash, page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.memory.stored_pages import Stored
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: Up to this many pages are hashed and looked up at once, on the scheduler's thread: a few
#: microseconds each, where a thread's answer comes a scheduling pass later.
INLINE_LOOKUP_PAGES = 32


@dataclass(frozen=True, slots=True)
class ColdLookup:
    """Which pages of a prompt, from the one at `at_page` on, a store has without a gap."""

    rid: str
    store: PageStore
    others: tuple[ColdTier, ...]
    """Those to be asked next, for what this one lacks."""
    root_hash: bytes
    tokens: array[int]
    page_size: int
    first_page: int
    at_page: int
    ends: tuple[tuple[Tier, int], ...]
    """The answers until now."""
    hashes: list[bytes]
    """Of all pages of the prompt; filled by the worker, and not read before it is done."""

    @property
    def n_pages(self) -> int:
        return 0


class Lookups:
    """Asks the stores, the nearest first, for what those before it lack.

    Of a short prompt those that know their pages answer at once; the others on a thread.
    """

    def __init__(self, context: TierContext, colds: Sequence[ColdTier]) -> None:
        self._context = context
        self._colds = colds
        self.queue: TransferQueue[ColdLookup] = TransferQueue("lookup", _look_up)

    def may_hit(self, anchor: Node, first: array[int]) -> bool:
        """Whether some store has, or may have, the page `first` after `anchor`."""
        stores = [cold.last_store for cold in self._colds if not cold.is_away]
        if not stores:
            return False
        if first.tobytes() in anchor.children:
            return True  # on its way for another request
        if self._context.stages is not None:
            return True  # they cannot be asked now: `ask`
        name = (page_hash(anchor.last_page_hash, first),)
        are_there = [int(store.known(name) != 0) for store in stores]
        return 1 in self._context.collective.minimum(are_there)

    def ask(self, rid: str, root: Node, tokens: array[int], anchor: Node) -> Stored | None:
        """What the stores have of a prompt after `anchor`; None: `answered` will say.

        tokens: whole pages.
        """
        size = self._context.page_size
        first, colds = anchor.end // size, self._open()
        if not colds:  # put away since the request came
            return Stored(first, (), [])
        n_pages = len(tokens) // size - first
        if n_pages > INLINE_LOOKUP_PAGES or self._context.stages is not None:
            self._submit(rid, root, tokens, first, first, (), colds)
            return None
        hashes = page_hashes(anchor.last_page_hash, tokens[anchor.end :], size)
        ends: tuple[tuple[Tier, int], ...] = ()
        at = 0
        for n_asked, cold in enumerate(colds):
            if at == len(hashes):
                break
            if not cold.traits.knows_locally:
                self._submit(rid, root, tokens, first, first + at, ends, colds[n_asked:])
                return None
            (n,) = self._context.collective.minimum([cold.known(hashes[at:]) or 0])
            if n:
                at += n
                ends = (*ends, (cold.tier, first + at))
        return Stored(first, ends, hashes, first)

    def _submit(
        self,
        rid: str,
        root: Node,
        tokens: array[int],
        first: int,
        at: int,
        ends: tuple[tuple[Tier, int], ...],
        colds: tuple[ColdTier, ...],
    ) -> None:
        store, others, size = colds[0].last_store, colds[1:], self._context.page_size
        self.queue.submit(
            ColdLookup(rid, store, others, root.last_page_hash, tokens, size, first, at, ends, [])
        )

    def answered(self, completion: Completion[ColdLookup]) -> Stored | None:
        """A store has answered; None: another one is asked now."""
        job = completion.job
        at = job.at_page + completion.n_done
        ends = job.ends
        if completion.n_done:
            ends = (*ends, (job.store.traits.tier, at))
        if at < len(job.tokens) // job.page_size and job.others:
            store, others = job.others[0].last_store, job.others[1:]
            self.queue.submit(replace(job, store=store, others=others, at_page=at, ends=ends))
            return None
        return Stored(job.first_page, ends, job.hashes)

    def _open(self) -> tuple[ColdTier, ...]:
        return tuple(cold for cold in self._colds if not cold.is_away)


def _look_up(job: ColdLookup) -> int:
    if not job.hashes:
        job.hashes.extend(page_hashes(job.root_hash, job.tokens, job.page_size))
    return job.store.lookup(job.hashes[job.at_page :])
