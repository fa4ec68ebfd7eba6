"""The sorted list of ids against sorting a dictionary; tenants' turns; whose patience has ended."""

from __future__ import annotations

import time
from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.scheduler.aging import Overdue
from tiered_kv.scheduler.ordered import OrderedIds
from tiered_kv.scheduler.tenants import TENANTS_MAX, TenantShares

STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "discard"]), st.integers(0, 6), st.integers(-3, 3))
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(-3, 4))
def test_ids_are_sorted_by_key_then_id(steps: list[tuple[str, int, int]], below: int) -> None:
    ordered, naive = OrderedIds(), dict[int, float]()
    for kind, request_id, key in steps:
        if kind == "put":
            ordered.put(request_id, float(key))
            naive[request_id] = float(key)
        else:
            ordered.discard(request_id)
            naive.pop(request_id, None)
        expected = sorted(naive, key=lambda i: (naive[i], i))
        assert list(ordered) == expected
        assert len(ordered) == len(naive)
        assert ordered.first_key() == min(naive.values(), default=float("inf"))
        assert ordered.below(below) == [i for i in expected if naive[i] < below]


class TestTenantShares:
    def test_who_was_given_less_goes_first(self) -> None:
        shares = TenantShares()
        for request_id, tenant in enumerate("abab"):
            shares.put(tenant, request_id, 0.0)
        shares.charge("a", 1.0)
        assert list(shares.merged({}, {})) == [1, 3, 0, 2]
        shares.charge("b", 3.0)
        assert list(shares.merged({}, {})) == [0, 2, 1, 3]

    def test_who_was_away_has_saved_nothing_up(self) -> None:
        shares = TenantShares()
        shares.put("a", 0, 0.0)
        shares.charge("a", 100.0)
        shares.put("b", 1, 0.0)
        shares.charge("b", 1.0)
        assert list(shares.merged({}, {})) == [0, 1]

    def test_a_new_name_starts_behind_whoever_had_most(self) -> None:
        shares = TenantShares()
        shares.put("much", 0, 0.0)
        shares.put("little", 1, 0.0)
        shares.charge("much", 100.0)
        shares.charge("little", 1.0)
        shares.put("new", 2, 0.0)
        assert list(shares.merged({3: 0.0}, {3: "newer"})) == [1, 0, 2, 3]
        assert shares.weight("newest") == shares.weight("new") == shares.weight("much") < 0.2

    def test_a_new_name_is_no_way_out_of_what_one_was_given(self) -> None:
        """Alternating names after each request, or keeping one: the other's turns are the same."""
        orders = []
        for names in (["greedy"] * 9, [f"greedy {i}" for i in range(9)]):
            shares, order = TenantShares(), []
            shares.put("modest", -1, 0.0)
            for request_id, name in enumerate(names):
                shares.put(name, request_id, 0.0)
                served = next(shares.merged({}, {}))
                order.append("modest" if served == -1 else "greedy")
                shares.discard(served)
                shares.charge("modest" if served == -1 else name, 1.0)
                shares.discard(request_id)
                shares.put("modest", -1, 0.0)
            orders.append(order)
        assert orders[0] == orders[1]
        assert orders[0].count("modest") >= 4

    def test_tenants_without_end_take_no_memory_without_end(self) -> None:
        shares = TenantShares()
        shares.put("waits", -1, 0.0)
        for at in range(3 * TENANTS_MAX):
            shares.put(f"t{at}", at, 0.0)
            shares.charge(f"t{at}", at + 1.0)
            shares.discard(at)
        assert len(shares._virtual_s) <= TENANTS_MAX + 1
        assert len(shares) == 1
        assert list(shares.merged({}, {})) == [-1]

    def test_beyond_those_that_count_all_are_one(self) -> None:
        shares = TenantShares()
        n = 2 * TENANTS_MAX
        for at in range(n):
            shares.put(f"t{at}", at, float(-at))
        assert len(shares._waiting) == TENANTS_MAX + 1
        assert sorted(shares.merged({}, {})) == list(range(n))
        for at in range(n):
            shares.discard(at)
        assert not shares._waiting
        assert len(shares) == 0

    def test_ten_thousand_names_cost_what_ten_do(self) -> None:
        """Weights and the head of the order, in the same run: both are looked at in each plan."""

        def seconds(n_names: int) -> float:
            shares = TenantShares()
            for request_id in range(10_000):
                shares.put(f"t{request_id % n_names}", request_id, float(request_id))
            best = float("inf")
            for _ in range(20):
                began = time.perf_counter()
                for at in range(64):
                    shares.charge(f"t{at % n_names}", 0.01)
                    shares.weight(f"t{at % n_names}")
                    list(islice(shares.merged({}, {}), 64))
                best = min(best, time.perf_counter() - began)
            return best

        assert seconds(10_000) < 4 * seconds(10)

    def test_others_are_merged_in_by_key(self) -> None:
        shares = TenantShares()
        shares.put("a", 0, 1.0)
        shares.put("a", 1, 3.0)
        assert list(shares.merged({7: 2.0, 8: 4.0}, {7: "a", 8: "a"})) == [0, 7, 1, 8]


class TestOverdue:
    def test_they_are_in_the_order_of_arrival_whenever_their_patience_ended(self) -> None:
        overdue = Overdue(1.0)
        overdue.add(1, arrival_s=0.0, max_wait_s=50.0)
        overdue.add(2, arrival_s=5.0, max_wait_s=10.0)
        overdue.add(3, arrival_s=6.0, max_wait_s=100.0)
        assert list(overdue.by_arrival(14.0)) == []
        assert list(overdue.by_arrival(15.0)) == [2]
        assert list(overdue.by_arrival(50.0)) == [1, 2]
        overdue.remove(1)
        assert list(overdue.by_arrival(60.0)) == [2]

    def test_their_turn_comes_with_the_work_of_others(self) -> None:
        overdue = Overdue(0.25)
        for request_id in range(9):
            overdue.add(request_id, arrival_s=0.0, max_wait_s=1.0)
        overdue.by_arrival(2.0)
        turns = []
        for _ in islice(range(100), 8):
            turns.append(overdue.is_their_turn())
            overdue.admitted(1.0, in_turn=turns[-1], now_s=2.0)
        assert turns == [True, False, False, False, True, False, False, False]
