"""The slot allocator against a naive first-in-first-out list, and the host pool over it."""

from __future__ import annotations

import mmap
from collections import deque

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers.alignment import ALIGNMENT_BYTES
from tiered_kv.tiers.host import MIN_HOST_PAGES, HostPool
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import SlotAllocator

pytestmark = pytest.mark.timeout(60)


class SlotMachine(RuleBasedStateMachine):
    """What the allocator hands out is what a plain queue would, in the same order."""

    @initialize(n_slots=st.integers(0, 12))
    def make(self, n_slots: int) -> None:
        self.slots = SlotAllocator(n_slots)
        self.queue = deque(range(n_slots))
        self.out: list[int] = []

    @rule(n=st.integers(0, 14))
    def alloc(self, n: int) -> None:
        ids = self.slots.alloc(n)
        if n > len(self.queue):
            assert ids is None
            return
        assert ids is not None
        assert ids.dtype == np.int64
        assert ids.tolist() == [self.queue.popleft() for _ in range(n)]
        self.out += ids.tolist()

    @rule(data=st.data())
    def free_some(self, data: st.DataObject) -> None:
        freed = data.draw(st.permutations(self.out))
        freed = freed[: data.draw(st.integers(0, len(freed)))]
        self.slots.free(np.array(freed, dtype=np.int64))
        self.queue.extend(freed)
        self.out = [slot for slot in self.out if slot not in set(freed)]

    @rule()
    def free_too_many(self) -> None:
        with pytest.raises(AssertionError, match="slots freed"):
            self.slots.free(np.zeros(len(self.out) + 1, dtype=np.int64))

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        kept = data.draw(st.permutations(self.out))
        kept = kept[: data.draw(st.integers(0, len(kept)))]
        self.slots.clear(np.array(kept, dtype=np.int64))
        self.queue = deque(slot for slot in range(self.slots.n_slots) if slot not in set(kept))
        self.out = kept

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "slots"):
            assert self.slots.n_free == len(self.queue)


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_ids_handed_out_are_not_changed_by_later_frees() -> None:
    slots = SlotAllocator(4)
    first = slots.alloc(4)
    assert first is not None
    slots.free(first[::-1].copy())
    assert slots.alloc(4) is not None
    assert first.tolist() == [0, 1, 2, 3]


# -- the host pool ---------------------------------------------------------------------------------

PAGE = PageFormat.of_buffers(4, [0, 1], [100, 100])


def test_every_slot_is_aligned_and_apart() -> None:
    pool = HostPool(PAGE, 8 * PAGE.slot_bytes + 17)
    assert pool.n_pages == pool.n_free == 8
    assert pool.pages.ctypes.data % ALIGNMENT_BYTES == 0
    ids = pool.alloc(8)
    assert ids is not None
    for i, view in zip(ids.tolist(), pool.views(ids), strict=True):
        assert len(view) == PAGE.slot_bytes
        assert not view.readonly
        view[:] = bytes([i + 1]) * len(view)
    for i in ids.tolist():
        assert (pool.pages[i] == i + 1).all()
    assert pool.alloc(1) is None
    pool.free(ids[:3])
    assert pool.n_free == 3
    pool.clear(keep=[ids[:2]])
    assert pool.n_free == 6
    taken = pool.alloc(6)
    assert taken is not None
    assert sorted([*taken.tolist(), *ids[:2].tolist()]) == list(range(8))
    assert pool.alloc(1) is None
    pool.free(ids[:2])
    assert pool.n_free == 2


def test_a_pool_too_small_says_how_much_it_needs() -> None:
    with pytest.raises(ConfigError, match=f"--tiered-kv-host-size to {4 * 4096} bytes"):
        HostPool(PAGE, MIN_HOST_PAGES * PAGE.slot_bytes - 1)
    assert HostPool(PAGE, MIN_HOST_PAGES * PAGE.slot_bytes).n_pages == MIN_HOST_PAGES


def test_the_whole_mapping_is_registered_for_dma() -> None:
    registered: list[tuple[int, int]] = []
    pool = HostPool(PAGE, 5 * PAGE.slot_bytes, lambda at, n: registered.append((at, n)))
    assert registered == [(pool.pages.ctypes.data, 5 * PAGE.slot_bytes)]
    assert registered[0][0] % mmap.PAGESIZE == 0
