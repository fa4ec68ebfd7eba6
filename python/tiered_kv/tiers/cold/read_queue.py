"""Reads from one store on a thread, in the order of `memory.read_turns`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.memory.read_order import Urgency
from tiered_kv.memory.read_turns import AT_ONCE, ReadTurns, Stretch
from tiered_kv.tiers.context import Epoch, TierContext
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.timeline import store_reads
from tiered_kv.tiers.transfer import Completion, TransferQueue

logger = logging.getLogger(__name__)


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
    submitted_at: float
    begun_at: float = 0.0
    service_s: float = 0.0
    completion: Completion[ColdRead] | None = None


class ReadQueue(TransferQueue[ColdRead]):
    """Not in the order of submission, so ranks agree on each read of its own (`ready`)."""

    def __init__(self, name: str, read: Callable[[ColdRead, slice], int]) -> None:
        """read: reads those pages of a job and says how many leading ones arrived."""
        self._read = read
        # Those not acknowledged, by op in the order of submission: the owner's.
        self._entries: dict[int, _Entry] = {}
        self._turns = ReadTurns()
        """Changed under `_progress`."""
        super().__init__(name, lambda job: job.n_pages)

    # -- the owner's side ---------------------------------------------------------------------

    def submit_by(self, job: ColdRead, urgency: Urgency) -> None:
        """As `submit`, for when its turn is."""
        self._n_submitted += 1
        self._pages_in_flight += job.n_pages
        self._entries[job.op] = _Entry(job, time.perf_counter())
        with self._progress:
            self._turns.add(job.op, job.n_pages, urgency)
            self._progress.notify_all()

    def submit(self, job: ColdRead) -> None:
        self.submit_by(job, AT_ONCE)

    def hurry(self, op: int, urgency: Urgency) -> None:
        """Somebody waits for this read who is as urgent as that."""
        with self._progress:
            self._turns.hurry(op, urgency)
            self._progress.notify_all()

    def forget(self, op: int, *, is_probe: bool = False) -> None:
        """Nobody waits for this read any more: see `ReadTurns.forget`."""
        with self._progress:
            self._turns.forget(op, is_probe=is_probe)
            self._progress.notify_all()

    def pages_before(self, urgency: Urgency) -> int:
        """Pages in flight that come before a read of that urgency: the same on every rank."""
        return self._turns.pages_before(urgency)

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
                with self._progress:
                    self._turns.drop(op)
        self._n_acknowledged += len(taken)
        self._pages_in_flight -= sum(completion.job.n_pages for completion in taken)
        return taken

    def ended_here(self) -> list[tuple[int, Completion[ColdRead] | None]]:
        return [(op, entry.completion) for op, entry in self._entries.items()]

    def take_one(self, number: int) -> Completion[ColdRead] | None:
        if number not in self._entries:
            return None
        return self.take([int(op == number) for op in self._entries])[0]

    def end(self) -> None:
        with self._progress:
            self._is_closing = True
            self._progress.notify_all()
        super().end()

    # -- the worker's side --------------------------------------------------------------------

    def _finish_one(self) -> bool:
        """A stretch of the most urgent read; False when the queue is closed."""
        with self._progress:
            self._progress.wait_for(lambda: self._turns or self._is_closing)
            stretch = self._turns.next()
            if stretch is None:
                return not self._is_closing
            entry = self._entries[stretch.op]
        is_to_read = stretch.start < stretch.stop and not self._is_closing
        if not is_to_read or self._read_stretch(entry, stretch):
            self._finish(entry)
        return True

    def _read_stretch(self, entry: _Entry, stretch: Stretch) -> bool:
        """True if the read is over."""
        job, began_at = entry.job, time.perf_counter()
        if not stretch.start:
            entry.begun_at = began_at
        try:
            n_read = self._read(job, slice(stretch.start, stretch.stop))
        except Exception:
            logger.exception("Tiered KV: a %s transfer failed, its pages are lost", self.name)
            n_read = 0
        entry.service_s += time.perf_counter() - began_at
        with self._progress:
            return self._turns.arrived(stretch, n_read)

    def _finish(self, entry: _Entry) -> None:
        ended_at = time.perf_counter()
        job = entry.job
        with self._progress:
            n_done, is_as_asked = self._turns.end(job.op)
        if self.observe is not None:
            self.observe(self.name, job, entry.begun_at or ended_at, ended_at, n_done)
        with self._progress:
            seconds = ended_at - entry.submitted_at
            entry.completion = Completion(job, n_done, seconds, entry.service_s, is_as_asked)
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
        if n_read < len(views):
            _forget_what_follows(job, stretch.start + n_read)
        return n_read

    return read


def _forget_what_follows(job: ColdRead, position: int) -> None:
    """The pages behind one that the disk lost as it was read, damaged for instance, are forgotten.

    Without it they serve nobody, and all are computed again. Those that are damaged, too, would
    stay as they are, since nothing is written that is there: each time the prompt is asked for, it
    would be found as far as the next one only.
    """
    store = job.store
    if store.traits.tier is not Tier.DISK or store.known(job.hashes[position : position + 1]):
        return
    try:
        store.drop(job.hashes[position + 1 :])
    except Exception:
        logger.exception("Tiered KV: pages behind one that was lost could not be forgotten")
