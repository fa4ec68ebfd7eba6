"""Reads from one store, the most urgent first and a stretch at a time.

No long read holds up a short one.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiered_kv.forest.node import Node
from tiered_kv.memory.probes import PROBE_PAGES
from tiered_kv.scheduler.read_order import LEAST_URGENT, Urgency
from tiered_kv.tiers.context import Epoch, TierContext
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.timeline import store_reads
from tiered_kv.tiers.transfer import Completion, TransferQueue

logger = logging.getLogger(__name__)

#: After this many pages of a read, the queue looks who is the most urgent now.
READ_STRETCH_PAGES = 64

_AT_ONCE: Urgency = (float("-inf"), 0.0)


@dataclass(frozen=True, slots=True)
class ColdRead:
    """Pages of one run, from `store` into `host_pages`; they go on after the node before `last`."""

    op: int
    store: PageStore
    last: Node
    hashes: list[bytes]
    host_pages: PageIds
    epoch: Epoch

    @property
    def n_pages(self) -> int:
        return len(self.hashes)


@dataclass(slots=True, eq=False)
class _Entry:
    job: ColdRead
    urgency: Urgency
    submitted_at: float
    begun_at: float = 0.0
    service_s: float = 0.0
    n_done: int = 0
    is_as_asked: bool = True
    is_wanted: bool = True
    is_probe: bool = False
    completion: Completion[ColdRead] | None = None


class ReadQueue(TransferQueue[ColdRead]):
    """Not in the order of submission, so ranks agree on each read of its own (`ready`)."""

    def __init__(self, name: str, read: Callable[[ColdRead, slice], int]) -> None:
        """read: reads those pages of a job and says how many leading ones arrived."""
        self._read = read
        # Those not acknowledged, by op in the order of submission: the owner's.
        self._entries: dict[int, _Entry] = {}
        # Of those not finished, by urgency, then in the order of submission; one whose urgency
        # changed is in there more than once. Under `_progress`.
        self._order: list[tuple[Urgency, int, _Entry]] = []
        self._n_pushed = 0
        super().__init__(name, lambda job: job.n_pages)

    # -- the owner's side ---------------------------------------------------------------------

    def submit_by(self, job: ColdRead, urgency: Urgency) -> None:
        """As `submit`, for when its turn is."""
        self._n_submitted += 1
        self._pages_in_flight += job.n_pages
        entry = self._entries[job.op] = _Entry(job, urgency, time.perf_counter())
        self._push(entry)

    def submit(self, job: ColdRead) -> None:
        self.submit_by(job, _AT_ONCE)

    def hurry(self, op: int, urgency: Urgency) -> None:
        """Somebody waits for this read who is as urgent as that."""
        entry = self._entries[op]
        if urgency < entry.urgency or not entry.is_wanted:
            entry.is_wanted, entry.is_probe = True, False
            entry.urgency = urgency
            self._push(entry)

    def forget(self, op: int, *, is_probe: bool = False) -> None:
        """Nobody waits for this read any more: it ends after the stretch under way.

        is_probe: its first pages are read all the same, after all others, to see how long it takes.
        """
        entry = self._entries[op]
        entry.is_wanted, entry.is_probe = False, is_probe
        entry.urgency = LEAST_URGENT if is_probe else _AT_ONCE
        self._push(entry)

    def pages_before(self, urgency: Urgency) -> int:
        """Pages in flight that come before a read of that urgency: the same on every rank."""
        entries = self._entries.values()
        return sum(entry.job.n_pages for entry in entries if entry.urgency <= urgency)

    @property
    def open_jobs(self) -> tuple[ColdRead, ...]:
        return tuple(entry.job for entry in self._entries.values())

    def ready(self) -> list[int]:
        """1 for each read in flight that is finished on this rank, 0 for the others."""
        return [int(entry.completion is not None) for entry in self._entries.values()]

    def everything(self) -> list[int]:
        return [1] * len(self._entries)

    def take(self, ready: Sequence[int]) -> list[Completion[ColdRead]]:
        """The completions of the reads in flight that all ranks have finished."""
        taken: list[Completion[ColdRead]] = []
        for op, is_ready in zip(list(self._entries), ready, strict=True):
            if is_ready:
                completion = self._entries.pop(op).completion
                assert completion is not None
                taken.append(completion)
        self._n_acknowledged += len(taken)
        self._pages_in_flight -= sum(completion.job.n_pages for completion in taken)
        return taken

    def end(self) -> None:
        with self._progress:
            self._is_closing = True
            self._progress.notify_all()
        super().end()

    def _push(self, entry: _Entry) -> None:
        with self._progress:
            self._n_pushed += 1
            heapq.heappush(self._order, (entry.urgency, self._n_pushed, entry))
            self._progress.notify_all()

    # -- the worker's side --------------------------------------------------------------------

    def _finish_one(self) -> bool:
        """A stretch of the most urgent read; False when the queue is closed."""
        with self._progress:
            self._progress.wait_for(lambda: self._order or self._is_closing)
            if not self._order:
                return False
            urgency, _, entry = self._order[0]
            if entry.completion is not None or entry.urgency != urgency:
                heapq.heappop(self._order)
                return True
        is_to_probe = entry.is_probe and not entry.n_done
        is_to_read = not self._is_closing and (entry.is_wanted or is_to_probe)
        if not is_to_read or self._read_stretch(entry) or is_to_probe:
            self._finish(entry)
        return True

    def _read_stretch(self, entry: _Entry) -> bool:
        """True if the read is over."""
        job, began_at = entry.job, time.perf_counter()
        if not entry.n_done:
            entry.begun_at = began_at
        most = PROBE_PAGES if entry.is_probe else READ_STRETCH_PAGES
        stretch = slice(entry.n_done, min(entry.n_done + most, job.n_pages))
        try:
            n_read = self._read(job, stretch)
        except Exception:
            logger.exception("Tiered KV: a %s transfer failed, its pages are lost", self.name)
            n_read = 0
        entry.service_s += time.perf_counter() - began_at
        entry.n_done += n_read
        entry.is_as_asked = entry.n_done == stretch.stop
        return entry.n_done < stretch.stop or stretch.stop == job.n_pages

    def _finish(self, entry: _Entry) -> None:
        ended_at = time.perf_counter()
        job, n_done = entry.job, entry.n_done
        if self.observe is not None:
            self.observe(self.name, job, entry.begun_at or ended_at, ended_at, n_done)
        with self._progress:
            seconds = ended_at - entry.submitted_at
            entry.completion = Completion(job, n_done, seconds, entry.service_s, entry.is_as_asked)
            self._n_finished += 1
            self._progress.notify_all()


def read_stretch(context: TierContext) -> Callable[[ColdRead, slice], int]:
    """What a queue does with a stretch of a read."""

    def read(job: ColdRead, stretch: slice) -> int:
        views = context.host.views(job.host_pages[stretch])
        began_s = time.perf_counter()
        n_read = job.store.get(job.hashes[stretch], views)
        if context.timeline is not None:
            now_s = time.perf_counter()
            row = store_reads(job.store.traits.tier)
            context.timeline.span(row, f"{n_read} pages", began_s, now_s, op=job.op)
        return n_read

    return read
