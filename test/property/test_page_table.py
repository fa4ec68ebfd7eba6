"""The page table against a dict, over random histories and many keys at once."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tiered_kv.tiers.disk.page_table import PageTable

# Few enough that histories meet them again; some shards get many, some share all but the last bits.
KEYS = [random.Random(1).getrandbits(64) for _ in range(50)]
KEYS += [7 << 56 | n for n in range(20)]
KEYS += [7 << 56 | n << 24 for n in range(20)]
KEYS += [0, 1, (1 << 64) - 1, (1 << 64) - 2]
keys = st.sampled_from(KEYS)
locations = st.integers(0, (1 << 62) - 1)


class PageTableMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable()
        self.model: dict[int, int] = {}

    @rule(key=keys, location=locations)
    def put(self, key: int, location: int) -> None:
        self.table.put(key, location)
        self.model[key] = location

    @rule(key=keys)
    def remove(self, key: int) -> None:
        self.table.remove(key)
        self.model.pop(key, None)

    @rule(first=st.integers(0, 1000))
    def put_many_in_one_shard(self, first: int) -> None:
        for n in range(first, first + 40):
            key = 9 << 56 | n << 20
            self.table.put(key, n)
            self.model[key] = n

    @rule()
    def build_anew(self) -> None:
        in_order = np.array(list(self.model), np.uint64)
        values = np.array(list(self.model.values()), np.uint64)
        self.table, left_out = PageTable.build(in_order, values, lambda _, __: True)
        assert left_out == []

    @invariant()
    def same_as_a_dict(self) -> None:
        assert len(self.table) == len(self.model)
        for key in KEYS:
            assert self.table.get(key) == self.model.get(key)


TestPageTable = PageTableMachine.TestCase
TestPageTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(keys, locations), max_size=200))
@settings(deadline=None)
def test_of_keys_that_are_there_twice_the_newest_counts(pairs: list[tuple[int, int]]) -> None:
    """Here the larger location is the newer one."""
    table, left_out = PageTable.build(
        np.array([key for key, _ in pairs], np.uint64),
        np.array([location for _, location in pairs], np.uint64),
        lambda first, second: first < second,
    )
    newest: dict[int, int] = {}
    for key, location in pairs:
        newest[key] = max(newest.get(key, -1), location)
    assert {key: table.get(key) for key in newest} == newest
    assert len(table) == len(newest)
    assert sorted([*left_out, *newest.values()]) == sorted(location for _, location in pairs)


def test_a_hundred_thousand_keys_come_and_go() -> None:
    choose = random.Random(2)
    table, model = PageTable(), {}
    for n in range(100_000):
        key = choose.getrandbits(64)
        table.put(key, n)
        model[key] = n
        if n % 3 == 0:
            gone = choose.choice(KEYS) if n % 2 else key
            table.remove(gone)
            model.pop(gone, None)
    assert len(table) == len(model)
    assert all(table.get(key) == location for key, location in model.items())
    cells = sum(len(s.arrays[0]) for s in table._shards if s is not None)
    assert cells * 16 < 50 * len(model), "bytes per key"
