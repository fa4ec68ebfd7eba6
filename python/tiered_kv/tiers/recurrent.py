"""Checkpoints of recurrent state: taken on the device, kept on the host, written to the disk.

The device has the states of running requests only. A checkpoint is a copy of one on the host, and
a request that goes on from it gets a copy of that: nobody ever writes into one. The scheduler's
thread copies; a thread of its own reads and writes the disk.

Each tensor-parallel rank has checkpoints of its own share of states. Ranks make the same calls in
the same order, so a slot has the same number on all of them; what a disk has, and what became of
reads and writes, counts as far as it is so on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import PageHash
from tiered_kv.forest.node import Node
from tiered_kv.memory.checkpoints import Boundary, Checkpoints, boundaries
from tiered_kv.tiers.progress import SETTLE_TIMEOUT_S
from tiered_kv.tiers.state_store import StateLayout, StateStore
from tiered_kv.tiers.transfer import Collective, SingleRank, TransferQueue

#: Of the host tier's bytes, what is for checkpoints where a model has recurrent state.
STATES_SHARE = 0.25
#: States that may wait to be written: each keeps a slot from being used for another.
WRITES_MAX = 4


class StateCopier(Protocol):
    """Copies one state between a slot of the engine's pool and `n_bytes` of memory.

    Called by the thread that launches passes: what it launched before counts as done.
    """

    n_bytes: int

    def save(self, device_slot: Any, memory: npt.NDArray[np.uint8]) -> None: ...

    def restore(self, memory: npt.NDArray[np.uint8], device_slot: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class StateJob:
    """One checkpoint on its way to the disk, or from it for the request `reader`."""

    name: PageHash
    slot: int
    reader: str | None = None
    n_pages: int = 1


@dataclass(slots=True)
class Wish:
    """Of a request that waits: whether a read is under way for it, and what could not be read."""

    is_reading: bool = False
    missing: set[PageHash] = field(default_factory=set)


class RecurrentStates:
    """What `tiers.places.Places` says and `tiers.context.Beside`, and more.

    slots: uint8 array of shape (checkpoints, layout.slot_bytes), as many on every rank; store: None
    without a disk, on every rank.
    """

    def __init__(
        self,
        copier: StateCopier,
        layout: StateLayout,
        slots: npt.NDArray[np.uint8],
        store: StateStore | None,
        page_size: int,
        collective: Collective | None = None,
    ) -> None:
        self.table = Checkpoints(len(slots))
        self.copier = copier
        self.layout = layout
        self._slots = slots
        self._store = store
        self._page_size = page_size
        self._collective = collective or SingleRank()
        self._unnamed: dict[str, tuple[int, int]] = {}
        """By request: its last state at the end of a page that is not in the tree yet."""
        self._held: dict[str, dict[int, int]] = {}
        """By request: slots that it may be given in this pass, by tokens."""
        self._wishes: dict[str, Wish] = {}
        self._queue: TransferQueue[StateJob] = TransferQueue("states", self._run)
        self._unwanted: set[int] = set()
        """Slots of reads that are to come to nothing."""
        self._n_writes = 0

    # -- taking them --------------------------------------------------------------------------

    def take(self, name: PageHash, device_slot: Any, *, is_lasting: bool) -> None:
        """The state in `device_slot` is that of the page `name`; is_lasting: for the disk, too."""
        if name in self.table:
            self.table.use(name)
            return
        slot = self.table.reserve()
        if slot is not None:
            self._save(device_slot, slot)
            self._keep(slot, name, is_lasting=is_lasting)

    def note(self, rid: str, n_tokens: int, device_slot: Any) -> None:
        """`rid` has produced tokens up to the end of a page; only its last such state is kept."""
        noted = self._unnamed.get(rid)
        slot = self.table.reserve() if noted is None else noted[1]
        if slot is not None:
            self._save(device_slot, slot)
            self._unnamed[rid] = n_tokens, slot

    def name_noted(self, rid: str, path: Sequence[Node], *, is_lasting: bool) -> None:
        """The pages of `rid` are in the tree, along `path`: and so is the state noted last."""
        noted = self._unnamed.pop(rid, None)
        if noted is None:
            return
        n_tokens, slot = noted
        at = next(boundaries(path, n_tokens, self._page_size), None)
        if at is None or at.n_tokens != n_tokens:
            self.table.give_back(slot)
        else:
            self._keep(slot, at.name, is_lasting=is_lasting)

    def forget_noted(self, rid: str) -> None:
        if rid in self._unnamed:
            self.table.give_back(self._unnamed.pop(rid)[1])

    def _save(self, device_slot: Any, slot: int) -> None:
        self.copier.save(device_slot, self._slots[slot][: self.layout.n_bytes])

    def _keep(self, slot: int, name: PageHash, *, is_lasting: bool) -> None:
        is_new = self.table.keep(slot, name)
        if is_new and is_lasting and self._store is not None and self._n_writes < WRITES_MAX:
            self.table.hold(slot)
            self._n_writes += 1
            self._queue.submit(StateJob(name, slot))

    # -- giving copies of them ----------------------------------------------------------------

    def promise(self, rid: str, path: Sequence[Node], device: int, usable: int) -> tuple[int, int]:
        """See `Places.promise`."""
        self._let_go(rid)
        place = on_device = self.table.deepest(path, usable, self._page_size)
        if place is not None and place.n_tokens > device:
            on_device = self.table.deepest(path, device, self._page_size)
        held = self._held[rid] = {}
        for one in {one for one in (place, on_device) if one is not None}:
            slot = held[one.n_tokens] = self.table.use(one.name)
            self.table.hold(slot)
        return _tokens(on_device), _tokens(place)

    def bring(self, last: Node) -> bool:
        """See `Places.bring`: a request gets its state with its slot (`give`)."""
        del last
        return True

    def give(self, rid: str, n_tokens: int, device_slot: Any) -> None:
        """`rid` is admitted with `n_tokens` cached: its own slot gets a copy of that state."""
        slot = self._held.get(rid, {}).get(n_tokens)
        if slot is None:
            raise IntegrityError(
                f"Request {rid} goes on after {n_tokens} tokens, and no state is kept of them."
            )
        self.copier.restore(self._slots[slot][: self.layout.n_bytes], device_slot)

    def end_promises(self) -> None:
        for rid in list(self._held):
            self._let_go(rid)

    def _let_go(self, rid: str) -> None:
        for slot in self._held.pop(rid, {}).values():
            self.table.let_go(slot)

    # -- the disk -----------------------------------------------------------------------------

    def wish(self, rid: str) -> None:
        if self._store is not None:
            self._wishes[rid] = Wish()

    def is_wished(self, rid: str) -> bool:
        return rid in self._wishes

    def forget_wish(self, rid: str) -> None:
        self._wishes.pop(rid, None)

    def has_come(self, rid: str, path: Sequence[Node], device: int, usable: int) -> bool:
        """See `Places.has_come`; a damaged checkpoint is passed over for the one before."""
        del device  # It has no states but those of requests.
        wish = self._wishes.get(rid)
        if wish is None or self._store is None:
            return True
        if wish.is_reading:
            return False
        name = self._stored(path, usable, wish.missing)
        slot = None if name is None else self.table.reserve()
        if name is None or slot is None:
            del self._wishes[rid]
            return True
        wish.is_reading = True
        self._queue.submit(StateJob(name, slot, rid))
        return False

    def _stored(self, path: Sequence[Node], usable: int, missing: set[PageHash]) -> PageHash | None:
        """The deepest checkpoint that all ranks have on disk and that is better than the host's."""
        assert self._store is not None
        deeper = itertools.takewhile(
            lambda place: place.name not in self.table,
            boundaries(path, usable, self._page_size),
        )
        names = [place.name for place in deeper if place.name not in missing]
        if not names:
            return None
        here = [int(name in self._store) for name in names]
        everywhere = self._collective.minimum(here)
        return next((name for name, has in zip(names, everywhere, strict=True) if has), None)

    def poll(self) -> None:
        """See `Places.poll`."""
        if not self._queue.in_flight:
            return
        (n_ready,) = self._collective.minimum([self._queue.n_ready])
        completions = self._queue.acknowledge(n_ready)
        if not completions:
            return
        # A state of which one rank lacks its share is none.
        n_done = self._collective.minimum([completion.n_done for completion in completions])
        for completion, is_whole in zip(completions, n_done, strict=True):
            self._over(completion.job, is_whole=bool(is_whole))

    def _over(self, job: StateJob, *, is_whole: bool) -> None:
        if job.reader is None:
            self._n_writes -= 1
            self.table.let_go(job.slot)
            return
        wish = self._wishes.get(job.reader)
        if wish is not None:
            wish.is_reading = False
        is_wanted = job.slot not in self._unwanted
        self._unwanted.discard(job.slot)
        if is_whole and is_wanted:
            self.table.keep(job.slot, job.name)
            return
        self.table.give_back(job.slot)
        if wish is not None:
            wish.missing.add(job.name)

    def _run(self, job: StateJob) -> int:
        assert self._store is not None
        memory = self._slots[job.slot]
        if job.reader is not None:
            return int(self._store.get(job.name, memory))
        self._store.put(job.name, memory)
        return 1

    # -- orders -------------------------------------------------------------------------------

    def loading(self, nodes: Iterable[Node]) -> None:
        """See `Beside.loading`: pages of these models are whole."""

    def removed(self, node: Node) -> None:
        """See `Beside.removed`."""

    def forget(self, names: Sequence[PageHash]) -> None:
        """See `Beside.forget`; what is on its way from the disk arrives for nobody."""
        for name in names:
            if name in self.table:
                self.table.drop(name)
        gone = set(names)
        reads = (job for job in self._queue.open_jobs if job.reader is not None)
        self._unwanted.update(job.slot for job in reads if job.name in gone)

    def drop_stored(self, names: Sequence[PageHash]) -> int:
        """See `Beside.drop_stored`: also what is being written."""
        if self._store is None:
            return 0
        self._queue.wait(SETTLE_TIMEOUT_S)
        return self._store.drop(names)

    # -- all of them --------------------------------------------------------------------------

    def flush(self) -> None:
        self.end_promises()
        for rid in list(self._unnamed):
            self.forget_noted(rid)
        self._wishes.clear()
        self.table.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError."""
        self.table.check_integrity()

    def close(self, timeout_s: float) -> None:
        # Ranks stop on their own.
        self._collective = SingleRank()
        self._queue.wait(timeout_s)
        self._queue.close()


def _tokens(place: Boundary | None) -> int:
    return 0 if place is None else place.n_tokens
