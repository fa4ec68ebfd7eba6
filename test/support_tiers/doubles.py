"""Doubles of what the tiers stand on: an allocator, and copies, disks and ranks gone wrong."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tiered_kv.tiers.device import CpuPageCopier, LayerDone
from tiered_kv.tiers.encoded_copier import EncodedCpuPageCopier
from tiered_kv.tiers.shared_memory import Ranks
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After

T = TypeVar("T")

#: No wait of a test should take longer; with it a hang becomes a failure with a stack.
PATIENCE_S = 20.0


class PagedAllocator:
    """Like upstream's paged allocator: a free list of pages, page 0 never handed out."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self.free_pages = list(range(1, n_pages + 1))

    def available(self) -> int:
        return len(self.free_pages) * self.page_size

    def alloc(self, n_tokens: int) -> torch.Tensor | None:
        assert n_tokens % self.page_size == 0
        n = n_tokens // self.page_size
        if n > len(self.free_pages):
            return None
        taken, self.free_pages = self.free_pages[:n], self.free_pages[n:]
        pages = torch.tensor(taken, dtype=torch.int64)
        return (pages[:, None] * self.page_size + torch.arange(self.page_size)).reshape(-1)

    def free(self, slots: torch.Tensor) -> None:
        pages = self.pages_of(slots)
        assert not set(pages) & set(self.free_pages), f"pages {pages} are freed twice"
        self.free_pages += pages

    def pages_of(self, slots: torch.Tensor) -> list[int]:
        """The pages of whole pages of slots, which must be in order."""
        rows = slots.reshape(-1, self.page_size)
        pages = rows[:, 0] // self.page_size
        expected = pages[:, None] * self.page_size + torch.arange(self.page_size)
        assert torch.equal(rows, expected), "these slots are not whole pages"
        return pages.tolist()


class Faults:
    """When a transfer of one kind is slow, held back, or fails; set by tests, read by workers."""

    def __init__(self) -> None:
        self.delay: Callable[[], float] = float
        self.error: Exception | None = None
        #: What the next transfers raise, one entry per transfer; then `error` holds again.
        self.errors_to_come: deque[Exception | None] = deque()
        self._open = threading.Event()
        self._open.set()

    def hold(self) -> None:
        """Transfers stop here until `release`."""
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        """A transfer comes by."""
        assert self._open.wait(PATIENCE_S), "a transfer was held back and never released"
        delay_s = self.delay()
        if delay_s:
            time.sleep(delay_s)
        error = self.errors_to_come.popleft() if self.errors_to_come else self.error
        if error is not None:
            raise type(error)(*error.args)


class _FaultyCopies:
    """Mixed into a copier: `Faults` before each copy, and a delay before each layer of a load."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.up = Faults()
        self.down = Faults()
        self.fail_at_layer: int | None = None

    def to_host(
        self,
        device_slots: torch.Tensor,
        host_pages: PageIds,
        after: After,
        part: PageIds | None = None,
    ) -> None:
        self.down.pass_through()
        super().to_host(device_slots, host_pages, after, part)  # type: ignore[misc]

    def to_device(
        self, host_pages: PageIds, device_slots: torch.Tensor, layer_done: LayerDone
    ) -> None:
        self.up.pass_through()

        def slow_layer_done(layer: int, event: Any) -> None:
            if layer == self.fail_at_layer:
                raise OSError("the bus is gone")
            layer_done(layer, event)
            delay_s = self.up.delay()
            if delay_s:
                time.sleep(delay_s / 4)

        super().to_device(host_pages, device_slots, slow_layer_done)  # type: ignore[misc]


class FaultyCopier(_FaultyCopies, CpuPageCopier):
    """Between a device and a host that keeps pages as they are."""


class FaultyEncodedCopier(_FaultyCopies, EncodedCpuPageCopier):
    """Between a device and a host that keeps pages in another format."""


class FaultyDisk:
    """A namespace with `Faults`, and with limits on how many leading pages of a call succeed."""

    def __init__(self, namespace: Any) -> None:
        self.namespace = namespace
        self.reads = Faults()
        self.writes = Faults()
        self.pages_per_read: int | None = None
        self.pages_per_write: int | None = None
        #: How many leading pages the next reads bring, one entry per read; then all of them.
        self.reads_to_come: deque[int] = deque()
        self.n_read_calls = 0

    def of_namespace(self, name: bytes) -> FaultyDisk:
        """Another namespace of the same disk, with the same faults."""
        other, pages = copy.copy(self), self._pages
        stored = pages._store.namespace(name, pages.page_bytes)
        if self.namespace is pages:
            other.namespace = stored
        else:
            other.namespace = copy.copy(self.namespace)
            other.namespace._disk = stored
        return other

    def clear_all(self) -> None:
        self._pages._store.clear()

    @property
    def _pages(self) -> Any:
        """The namespace below a conversion, if there is one."""
        return getattr(self.namespace, "_disk", self.namespace)

    def __len__(self) -> int:
        return len(self.namespace)

    def contains(self, page_hash: bytes) -> bool:
        return bool(self.namespace.contains(page_hash))

    def count_prefix(self, hashes: Sequence[bytes]) -> int:
        return int(self.namespace.count_prefix(hashes))

    def touch(self, hashes: Iterable[bytes]) -> None:
        self.namespace.touch(hashes)

    def drop_pages(self, hashes: Sequence[bytes]) -> int:
        return int(self.namespace.drop_pages(hashes))

    def drain_dropped(self) -> list[bytes] | None:
        dropped: list[bytes] | None = self.namespace.drain_dropped()
        return dropped

    def write_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        self.writes.pass_through()
        n = self.pages_per_write
        return int(self.namespace.write_pages(hashes[:n], buffers[:n]))

    def read_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        self.n_read_calls += 1
        self.reads.pass_through()
        n = self.reads_to_come.popleft() if self.reads_to_come else self.pages_per_read
        return int(self.namespace.read_pages(hashes[:n], buffers[:n]))


class BarrierMinimum:
    """The minimum over rank threads; every rank must make the same calls in the same order."""

    def __init__(self, n_ranks: int) -> None:
        self._values: list[list[int]] = [[] for _ in range(n_ranks)]
        self._data: list[bytes] = [b""] * n_ranks
        self._barrier = threading.Barrier(n_ranks, timeout=PATIENCE_S)

    def rank(self, index: int) -> Ranks:
        return _BarrierRank(self, index)

    def abort(self) -> None:
        """A rank has failed: wake the others with BrokenBarrierError."""
        self._barrier.abort()

    def on_each(self, step: Callable[[int], T]) -> list[T]:
        """What `step` returns for each rank, carried out by all at once; raises what one raises."""
        outcomes: dict[int, T] = {}
        errors: list[Exception] = []

        def run(rank: int) -> None:
            try:
                outcomes[rank] = step(rank)
            except Exception as error:
                errors.append(error)
                self.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(self._values))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            # A broken barrier is only how the others heard of it.
            raise min(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError))
        return [outcome for _, outcome in sorted(outcomes.items())]

    def minimum(self, index: int, values: list[int]) -> list[int]:
        self._values[index] = list(values)
        self._barrier.wait()
        columns = list(zip(*self._values, strict=True))  # raises if ranks ask different things
        self._barrier.wait()
        return [min(column) for column in columns]

    def gather(self, index: int, data: bytes) -> list[bytes]:
        self._data[index] = data
        self._barrier.wait()
        gathered = list(self._data)
        self._barrier.wait()
        return gathered


@dataclass(frozen=True, slots=True)
class _BarrierRank:
    parent: BarrierMinimum
    index: int

    def minimum(self, values: list[int]) -> list[int]:
        return self.parent.minimum(self.index, values)

    def gather(self, data: bytes) -> list[bytes]:
        return self.parent.gather(self.index, data)


def random_delays(seed: int, longest_s: float) -> Callable[[], float]:
    """Delays for `Faults`: half of them none, the others up to `longest_s`."""
    rng = random.Random(seed)
    return lambda: rng.random() * longest_s if rng.random() < 0.5 else 0.0
