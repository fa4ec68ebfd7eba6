"""The orders of the baselines, on queues small enough to order by hand."""

from __future__ import annotations

import pytest

from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.api.slo import Slo
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.policies import lpm
from tiered_kv.scheduler.policies.niyama import Niyama
from tiered_kv.scheduler.prefill_room import MIN_CHUNK_TOKENS
from tiered_kv.scheduler.request_policy import request_policies

NAMES = (
    *("fcfs", "lpm", "dfs-weight", "priority", "hrrn", "k-lpm", "edf", "niyama"),
    *("sliding-serve", "plas", "atlas", "program-fcfs", "pausing"),
)
TIGHT, LOOSE = Slo("interactive", 0.5, 0.05), Slo("batch", 30.0, None)


def queue(name: str) -> Queue:
    return Queue(request_policies.get(name)())


@pytest.mark.parametrize("name", NAMES)
class TestEveryPolicy:
    def test_plans_everyone_who_is_not_held_once(self, name: str) -> None:
        q = queue(name)
        q.cache([1, 2, 3])
        for request_id in range(20):
            q.now_s = request_id * 0.01
            q.arrive(request_id, [1, 2, 3, 100 + request_id][request_id % 4 :])
        q.hold(3, 7)
        assert sorted(q.order()) == [i for i in range(20) if i not in q.held]

    def test_a_limit_gives_the_head_of_the_same_order(self, name: str) -> None:
        q = queue(name)
        q.cache([1, 2, 3])
        for request_id in range(30):
            q.now_s = request_id * 0.01
            blocks = [[1, 2, 3], [1, 2, 9], [1, 8], [50 + request_id]][request_id % 4]
            q.arrive(request_id, blocks, priority=request_id % 3)
        whole = q.order()
        assert q.order(limit=7) == whole[:7]
        assert q.order(limit=1) == whole[:1]

    def test_an_empty_queue_gives_an_empty_plan(self, name: str) -> None:
        assert queue(name).order() == []

    def test_who_was_admitted_is_not_planned_again(self, name: str) -> None:
        q = queue(name)
        for request_id in range(5):
            q.arrive(request_id, [request_id + 1])
        first = q.order(limit=1)[0]
        q.admit(first)
        assert sorted(q.order()) == sorted({0, 1, 2, 3, 4} - {first})


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="fcfs"):
        request_policies.get("nope")


def test_fcfs_keeps_the_order_of_joining() -> None:
    q = queue("fcfs")
    for request_id in (4, 2, 9):
        q.arrive(request_id, [request_id])
    retracted = q.waiting.get(4)
    q.admit(4)
    q.waiting.add(retracted)
    assert q.order() == [2, 9, 4]


def test_priority_orders_by_priority_then_age() -> None:
    q = queue("priority")
    for request_id, priority in enumerate((0, 2, 1, 2)):
        q.now_s = request_id
        q.arrive(request_id, [request_id + 1], priority=priority)
    assert q.order() == [1, 3, 2, 0]


def test_edf_orders_by_first_token_deadline_and_those_without_last() -> None:
    q = queue("edf")
    q.arrive(0, [1])
    q.arrive(1, [2], slo=LOOSE)
    q.now_s = 29.0
    q.arrive(2, [3], slo=TIGHT)
    q.now_s = 29.8
    q.arrive(3, [4], slo=TIGHT)
    # Deadlines: none, 30.0, 29.5, 30.3.
    assert q.order() == [2, 1, 3, 0]


class TestLongestPrefixMatch:
    def test_device_and_host_count_and_ties_keep_their_order(self) -> None:
        q = queue("lpm")
        q.cache([1, 2])
        q.cache([1, 2, 3], Tier.HOST)
        q.cache([7])
        for request_id, blocks in enumerate(([7, 8], [1, 2, 9], [9, 9], [1, 2, 3, 4], [7, 9])):
            q.arrive(request_id, blocks)
        assert q.order() == [3, 1, 0, 4, 2]

    def test_of_requests_that_begin_alike_uncached_only_the_first_competes(self) -> None:
        q = queue("lpm")
        q.cache([1])
        q.arrive(0, [5, 6])
        q.arrive(1, [5, 7])
        q.arrive(2, [8])
        q.arrive(3, [1, 5])
        q.arrive(4, [1, 6])
        # 1 begins like 0; 3 and 4 begin alike, too, but with what is cached.
        assert q.order() == [3, 4, 0, 2, 1]

    def test_above_128_it_keeps_the_last_order_and_appends(self) -> None:
        q = queue("lpm")
        q.cache([1])
        for request_id in range(lpm.MAX_SORTED):
            q.arrive(request_id, [1] if request_id == 100 else [1000 + request_id])
        assert q.order(limit=2) == [100, 0]
        q.arrive(500, [1])
        order = q.order()
        assert order[0] == 100
        assert order[-1] == 500
        q.admit(100)
        assert q.order(limit=2) == [500, 0]


def test_dfs_weight_visits_the_heavier_subtree_first_and_leaves_before_their_ancestors() -> None:
    q = queue("dfs-weight")
    q.cache([1, 2])
    q.cache([1, 3])
    q.cache([4])
    q.arrive(0, [4, 100])
    q.arrive(1, [1, 101])
    q.arrive(2, [1, 2, 102])
    q.arrive(3, [1, 3, 103])
    q.arrive(4, [1, 3, 104])
    q.arrive(5, [105])
    # Below the root: [1] has four, [4] one. Below [1]: [3] has two, [2] one; then [1]'s own.
    assert q.order() == [3, 4, 2, 1, 0, 5]


class TestHighestResponseRatio:
    def test_work_done_since_arrival_over_own_work(self) -> None:
        q = queue("hrrn")
        q.arrive(0, range(1, 9))  # 513 tokens
        q.processed = 1000
        q.arrive(1, range(11, 13))  # 129 tokens
        q.processed = 1200
        # Ratios: 1200 / 513 = 2.3 and 200 / 129 = 1.6.
        assert q.order() == [0, 1]
        q.processed = 3000
        # 5.8 and 15.5: the short one has overtaken.
        assert q.order() == [1, 0]

    def test_who_is_cached_entirely_comes_first(self) -> None:
        q = queue("hrrn")
        q.cache([1, 2])
        q.arrive(0, [5])
        q.processed = 10**6
        q.arrive(1, [1, 2], tokens=2 * BLOCK_TOKENS)
        assert q.order() == [1, 0]


class TestOldestThenLongestPrefix:
    def test_one_in_four_turns_is_the_oldest_request_s(self) -> None:
        q = queue("k-lpm")
        q.cache([1, 2, 3])
        for request_id in range(4):
            q.now_s = request_id
            q.arrive(request_id, [50 + request_id])
        for request_id in range(4, 10):
            q.now_s = request_id
            q.arrive(request_id, [1, 2, 3])
        assert q.order() == [0, 4, 5, 6, 1, 7, 8, 9, 2, 3]

    def test_the_cycle_goes_on_from_plan_to_plan(self) -> None:
        q = queue("k-lpm")
        q.cache([1])
        for request_id in range(6):
            q.now_s = request_id
            q.arrive(request_id, [50 + request_id] if request_id < 3 else [1])
        whole = q.order()
        seen = []
        while q.order():
            seen.append(q.order(limit=1)[0])
            q.admit(seen[-1])
        assert seen == whole == [0, 3, 4, 5, 1, 2]


class TestNiyama:
    def test_shorter_work_goes_first_among_equal_deadlines(self) -> None:
        q = queue("niyama")
        q.arrive(0, range(100, 200), slo=LOOSE)
        q.arrive(1, [1], slo=LOOSE)
        assert q.order() == [1, 0]

    def test_alpha_zero_is_edf(self) -> None:
        q = Queue(Niyama(alpha=0.0))
        q.arrive(0, range(100, 200), slo=LOOSE)
        q.now_s = 0.01
        q.arrive(1, [1], slo=LOOSE)
        assert q.order() == [0, 1]

    def test_who_cannot_make_it_goes_behind_who_can(self) -> None:
        q = queue("niyama")
        q.arrive(0, [1], slo=TIGHT)
        q.now_s = 0.6
        q.arrive(1, [2], slo=TIGHT)
        q.arrive(2, [3], slo=LOOSE)
        assert q.order() == [1, 2, 0]

    def test_chunks_shrink_to_the_tightest_running_token_deadline(self) -> None:
        q = queue("niyama")
        q.arrive(0, range(1, 200), slo=LOOSE)
        assert q.plan().prefill_tokens == 8192
        running = q.arrive(1, [500], slo=TIGHT)
        q.admit(1)
        running.output_tokens, running.first_token_s = 3, 0.1
        q.running = [running]
        q.now_s = 0.5
        plan = q.plan()
        assert plan.mix_decodes
        # Whoever decodes counts for one of the tokens.
        n_new = plan.prefill_tokens - 1
        assert MIN_CHUNK_TOKENS <= n_new < 8192
        # Its fourth token is due 0.5 + 3 * 0.05 s after its arrival: 150 ms from now.
        costs = q.state().costs
        within_s = costs.iteration_s(((n_new, 0),), running.prompt_tokens, 1)
        beyond_s = costs.iteration_s(((n_new + 64, 0),), running.prompt_tokens, 1)
        assert within_s <= 0.15 < beyond_s

    def test_many_who_decode_leave_their_chunk_to_the_prefill(self) -> None:
        """As the others do: what is worth a pass, and one token for each of them."""
        q = queue("niyama")
        for request_id in range(300):
            q.running.append(q.arrive(request_id, [request_id], slo=Slo("fast", 0.5, 1e-4)))
            q.admit(request_id)
        q.arrive(1000, range(1000, 1200), slo=LOOSE)
        assert q.plan().prefill_tokens >= MIN_CHUNK_TOKENS + 300


class TestSlidingServe:
    def test_levels(self) -> None:
        q = queue("sliding-serve")
        q.arrive(0, [1, 2, 3], slo=Slo("far", 600.0))
        q.arrive(1, [4], slo=Slo("far", 600.0))
        q.arrive(2, [5], slo=Slo("hopeless", 1e-4))
        q.arrive(3, [6, 7], slo=Slo("soon", 0.3))
        assert q.order() == [3, 1, 0, 2], "at risk, shorter work, longer work, beyond hope"

    def test_of_those_at_risk_as_many_as_possible_are_saved(self) -> None:
        q = queue("sliding-serve")
        one_s = q.state().costs.prefill_s(60 * BLOCK_TOKENS + 1)
        q.arrive(0, range(1000, 1120), slo=Slo("tight", 2.3 * one_s))
        for request_id in (1, 2):
            blocks = range(10_000 * request_id, 10_000 * request_id + 60)
            q.arrive(request_id, blocks, slo=Slo("tight", 2.5 * one_s))
        assert q.order() == [1, 2, 0], "least slack alone would take the long one, and lose two"

    def test_two_iterations_are_planned_together(self) -> None:
        q = queue("sliding-serve")
        running = q.arrive(0, range(40), slo=Slo("chat", 1.0, 0.1))
        q.admit(0)
        running.output_tokens, running.first_token_s = 3, 0.0
        q.running.append(running)
        q.now_s = 1.2
        q.arrive(1, range(100_000, 100_600), slo=LOOSE)
        tokens = q.plan().prefill_tokens
        assert tokens is not None
        costs, context = q.state().costs, running.prompt_tokens + running.output_tokens
        first_s = costs.iteration_s(((tokens - 1, 0),), context, 1)
        assert first_s <= 0.1 + 1e-9, "its token is due 100 ms from now"
        assert tokens > MIN_CHUNK_TOKENS

    def test_nothing_due_is_no_limit(self) -> None:
        q = queue("sliding-serve")
        q.arrive(0, [1], slo=LOOSE)
        assert q.plan().prefill_tokens is None
