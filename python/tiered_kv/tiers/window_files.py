"""KV of layers with a window, between host and disk: records beside those of other pages."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiered_kv.core.ids import PageHash
from tiered_kv.memory.checkpoints import Checkpoints
from tiered_kv.tiers.cold.local_pages import LocalPages
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: Pages that are written at a time.
WRITTEN_PAGES = 16


@dataclass(frozen=True, slots=True)
class Filing:
    """Pages on their way to the disk, or from it for the request `reader`."""

    names: tuple[PageHash, ...]
    host_pages: tuple[int, ...]
    reader: str | None = None

    @property
    def n_pages(self) -> int:
        return len(self.names)


@dataclass(slots=True)
class Wish:
    """Of a request that waits: whether a read is under way for it, and what could not be read."""

    is_reading: bool = False
    missing: set[PageHash] = field(default_factory=set)


class WindowFiles:
    """table: names of `pages`, uint8 (pages, slot bytes); store: None without a disk."""

    def __init__(
        self, table: Checkpoints, pages: npt.NDArray[np.uint8], store: LocalPages | None
    ) -> None:
        self._table, self._pages, self._store = table, pages, store
        self._unwritten: OrderedDict[PageHash, None] = OrderedDict()
        self._wishes: dict[str, Wish] = {}
        self._queue: TransferQueue[Filing] = TransferQueue("windows-disk", self._run)
        self._n_writing = 0

    # -- what requests wait for ---------------------------------------------------------------

    def wish(self, rid: str) -> None:
        if self._store is not None:
            self._wishes[rid] = Wish()

    def is_wished(self, rid: str) -> bool:
        return rid in self._wishes

    def forget_wish(self, rid: str) -> None:
        self._wishes.pop(rid, None)

    def may_have(self, rid: str, name: PageHash) -> bool:
        """Whether the disk has it, and `rid` has not tried in vain to read it."""
        missing = self._wishes[rid].missing
        return self._store is not None and name not in missing and self._store.contains(name)

    def has_come(self, rid: str, names: Sequence[PageHash]) -> bool:
        """Whether `rid`, which wants these pages, need not wait; starts to read them."""
        wish = self._wishes[rid]
        if wish.is_reading:
            return False
        wish.is_reading = self._read(rid, names)
        if not wish.is_reading:
            del self._wishes[rid]
        return not wish.is_reading

    def _read(self, rid: str, names: Sequence[PageHash]) -> bool:
        """False if there is nothing to read, or no room for all."""
        pages: list[int] = []
        for _ in names:
            page = self._table.reserve()
            if page is None:
                break
            pages.append(page)
        if not names or len(pages) < len(names):
            for page in pages:
                self._table.give_back(page)
            return False
        self._queue.submit(Filing(tuple(names), tuple(pages), rid))
        return True

    # -- what is written ----------------------------------------------------------------------

    def offer(self, name: PageHash) -> None:
        """The host has it, and it is to be on the disk as well if it stays for long enough."""
        if self._store is not None:
            self._unwritten[name] = None

    def take_back(self, name: PageHash) -> None:
        """It is not to be written any more."""
        self._unwritten.pop(name, None)

    def _write(self, store: LocalPages) -> None:
        """The next few that the disk lacks, one lot at a time."""
        names: list[PageHash] = []
        while self._unwritten and not self._n_writing and len(names) < WRITTEN_PAGES:
            name, _ = self._unwritten.popitem(last=False)
            if name in self._table and not store.contains(name):
                names.append(name)
        if names:
            pages = tuple(self._table.use(name) for name in names)
            for page in pages:
                self._table.hold(page)
            self._n_writing += 1
            self._queue.submit(Filing(tuple(names), pages))

    # -- progress -----------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return self._queue.in_flight > 0 or bool(self._unwritten)

    def poll(self) -> None:
        """Takes up what has been read and written, and goes on."""
        for completion in self._queue.acknowledge(self._queue.n_ready):
            self._over(completion)
        if self._store is not None and self._unwritten:
            self._write(self._store)

    def _over(self, completion: Completion[Filing]) -> None:
        job = completion.job
        if job.reader is None:
            self._n_writing -= 1
            for page in job.host_pages:
                self._table.let_go(page)
            return
        for place, (name, page) in enumerate(zip(job.names, job.host_pages, strict=True)):
            if place < completion.n_done:
                self._table.keep(page, name)
            else:
                self._table.give_back(page)
        wish = self._wishes.get(job.reader)
        if wish is None:
            return
        wish.is_reading = False
        if completion.n_done < job.n_pages:
            # Those behind the first that is not there were not tried.
            wish.missing.add(job.names[completion.n_done])

    def _run(self, job: Filing) -> int:
        assert self._store is not None
        views = [memoryview(self._pages[page]) for page in job.host_pages]
        if job.reader is not None:
            return self._store.read_pages(job.names, views)
        self._store.write_pages(job.names, views)
        return job.n_pages

    def drop(self, names: Sequence[PageHash]) -> int:
        """The disk is to have them no more; on a thread of its own. Returns how many it had."""
        return 0 if self._store is None else self._store.drop_pages(names)

    def forget(self) -> None:
        """Nobody waits, and what was to be written is not; what is under way arrives."""
        self._wishes.clear()
        self._unwritten.clear()

    def close(self, deadline_s: float) -> None:
        """Writes what is to be written until `deadline_s`, by time.monotonic."""
        while self.is_busy and self._queue.wait(max(0.0, deadline_s - time.monotonic())):
            self.poll()
        self._queue.close()
