"""The policy slack on queues small enough to order by hand."""

from __future__ import annotations

import pytest

from support_simulation.builders import BLOCK_TOKENS, Queue, cost_model
from support_simulation.slack_queue import blocks, queue
from tiered_kv.api.slo import Slo
from tiered_kv.core.errors import ConfigError
from tiered_kv.scheduler.policies.slack import PRICED_AT_ONCE, SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.request_policy import ForecastingPolicy, request_policies

TIGHT, LOOSE = Slo("interactive", 0.5, 0.05), Slo("batch", 30.0, None)
IMPATIENT = Slo("interactive", 0.5, 0.05, max_wait_s=10.0)


def test_it_can_be_had_by_name_and_forecasts() -> None:
    policy = request_policies.get("slack")()
    assert isinstance(policy, SlackPolicy)
    assert isinstance(policy, ForecastingPolicy)


@pytest.mark.parametrize("name", ["overdue_share", "max_wait_s", "patience", "memory_margin"])
def test_senseless_values_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SlackConfig(**{name: -1.0})  # type: ignore[arg-type]


class TestEveryOrder:
    def fill(self, q: Queue, n: int = 100) -> None:
        for request_id in range(n):
            q.now_s = request_id * 0.02
            slo = (TIGHT, LOOSE, Slo("none"), Slo("standard", 2.0, 0.1))[request_id % 4]
            q.arrive(request_id, blocks(request_id, 1 + request_id % 30), slo=slo)

    def test_everyone_who_shares_nothing_is_planned_once_but_those_held(self) -> None:
        q = queue()
        self.fill(q)
        q.hold(3, 7, 50, ready_s=q.now_s)
        assert sorted(q.order()) == [i for i in range(100) if i not in q.held]

    def test_a_limit_gives_the_head_of_the_same_order(self) -> None:
        q = queue()
        self.fill(q)
        whole = q.order()
        assert q.order(limit=7) == whole[:7]
        assert q.order(limit=1) == whole[:1]

    def test_who_was_admitted_or_aborted_is_not_planned_again(self) -> None:
        q = queue()
        self.fill(q, 5)
        first, second = q.order()[:2]
        q.admit(first)
        gone = q.waiting.get(second)
        q.waiting.remove(gone)
        q.policy.on_abort(gone, q.now_s)
        assert sorted(q.order()) == sorted({0, 1, 2, 3, 4} - {first, second})

    def test_of_a_burst_only_so_many_are_priced_for_one_plan(self) -> None:
        q = queue()
        n = 2 * PRICED_AT_ONCE + 10
        for request_id in range(n):
            q.arrive(request_id, [request_id])
        seen = [len(q.order(limit=n)) for _ in range(3)]
        assert seen == [PRICED_AT_ONCE, 2 * PRICED_AT_ONCE, n]

    def test_the_overdue_are_priced_first(self) -> None:
        q = queue()
        for request_id in range(2 * PRICED_AT_ONCE):
            q.arrive(request_id, [request_id])
        last = Slo("interactive", 0.5, 0.05, max_wait_s=1.0)
        q.arrive(10_000, [10_000], slo=last)
        q.now_s = 2.0
        assert q.order(limit=1) == [10_000]


class TestDeadlines:
    def test_the_sooner_deadline_goes_first(self) -> None:
        q = queue()
        q.arrive(0, blocks(0), slo=LOOSE)
        q.arrive(1, blocks(1), slo=TIGHT)
        assert q.order() == [1, 0]

    def test_who_is_beyond_hope_is_relegated_and_one_without_deadline_is_behind(self) -> None:
        q = queue()
        q.arrive(0, blocks(0), slo=TIGHT)
        q.now_s = 0.6
        q.arrive(1, blocks(1), slo=LOOSE)
        q.arrive(2, blocks(2), slo=TIGHT)
        q.arrive(3, blocks(3))
        assert q.order() == [2, 1, 0, 3]

    def test_hope_returns_when_the_prefix_gets_cached(self) -> None:
        q = queue()
        # About 0.7 s of prefill in 0.5 s.
        late = q.arrive(0, blocks(0, 350), slo=TIGHT)
        q.arrive(1, blocks(1), slo=LOOSE)
        assert q.order() == [1, 0]
        q.cache(blocks(0, 340))
        for request in q.waiting.changed(q.forest.match(q.root, late.tokens).path):
            q.policy.on_cached_change(request, q.now_s)
        # It was matched at its arrival, and nothing was below: it is looked up by its beginning.
        assert late.device_tokens == 340 * BLOCK_TOKENS
        assert q.order() == [0, 1]

    def test_of_those_who_cannot_all_be_in_time_the_longest_gives_way(self) -> None:
        q = queue()
        for request_id, n in ((0, 150), (1, 40), (2, 40), (3, 40)):
            q.now_s = request_id * 1e-3
            q.arrive(request_id, blocks(request_id, n), slo=TIGHT)
        assert q.order() == [1, 2, 3, 0]
        # Least slack, or the earliest deadline, would have taken the long one first.

    def test_without_slack_arrival_counts(self) -> None:
        q = queue(slack=False)
        for request_id, slo in enumerate((LOOSE, TIGHT, LOOSE)):
            q.now_s = request_id
            q.arrive(request_id, blocks(request_id), slo=slo)
        assert q.order() == [0, 1, 2]


class TestAging:
    def test_without_deadlines_short_work_overtakes_but_not_for_ever(self) -> None:
        q = queue(patience=10.0)
        q.arrive(0, blocks(0, 100))
        q.now_s = 0.1
        q.arrive(1, blocks(1, 2))
        q.now_s = 20.0
        q.arrive(2, blocks(2, 2))
        assert q.order() == [1, 0, 2]

    def test_the_overdue_go_first_by_arrival(self) -> None:
        q = queue(max_wait_s=10.0, overdue_share=1.0)
        q.arrive(0, blocks(0, 300))
        q.now_s = 1.0
        q.arrive(1, blocks(1, 2))
        q.now_s = 12.0
        q.arrive(2, blocks(2), slo=TIGHT)
        assert q.order() == [0, 1, 2]

    def test_a_request_s_own_patience_counts(self) -> None:
        q = queue(max_wait_s=1000.0, overdue_share=1.0)
        q.arrive(0, blocks(0, 2), slo=Slo("standard", 2.0, 0.1))
        q.arrive(1, blocks(1, 300), slo=IMPATIENT)
        q.now_s = 9.0
        assert q.order() == [0, 1]
        q.now_s = 11.0
        assert q.order() == [1, 0]

    def test_they_get_their_share_and_no_more_while_others_can_be_in_time(self) -> None:
        q = queue(max_wait_s=10.0, overdue_share=0.25)
        for request_id in range(40):
            q.arrive(request_id, blocks(request_id, 4))
        q.now_s = 20.0
        for request_id in range(40, 80):
            q.arrive(request_id, blocks(request_id, 4), slo=LOOSE)
        admitted = []
        for _ in range(40):
            admitted.append(q.order(limit=1)[0])
            q.admit(admitted[-1])
        overdue = [request_id for request_id in admitted if request_id < 40]
        assert overdue == sorted(overdue)
        # All have the same work: a quarter of it, and one that was begun.
        assert 10 <= len(overdue) <= 11

    def test_switched_off_nobody_is_overdue(self) -> None:
        q = queue(aging=False, max_wait_s=1.0)
        q.arrive(0, blocks(0, 300))
        q.now_s = 500.0
        q.arrive(1, blocks(1, 2))
        assert q.order() == [1, 0]


SHARED = [1, 2, 3, 4, 5, 6]  # 384 tokens


class TestGangs:
    def gang(self, q: Queue, n: int = 3) -> None:
        for request_id in range(n):
            q.now_s = request_id * 1e-3
            q.arrive(request_id, [*SHARED, 100 + request_id], slo=LOOSE)

    def test_one_computes_what_nobody_has_and_the_others_are_kept_back(self) -> None:
        q = queue()
        self.gang(q)
        q.arrive(9, blocks(9), slo=LOOSE)
        assert q.order() == [0, 9]

    def test_they_follow_once_it_is_cached(self) -> None:
        q = queue()
        self.gang(q)
        q.order()
        q.admit(0)
        assert q.order() == []
        q.cache(SHARED)
        for request in q.waiting.changed(q.forest.match(q.root, q.waiting.get(1).tokens).path):
            q.policy.on_cached_change(request, q.now_s)
        assert q.order() == [1, 2]

    def test_they_wait_no_longer_than_its_prefill_should_last(self) -> None:
        q = queue()
        self.gang(q, 2)
        q.order()
        q.admit(0)
        assert q.order() == []
        q.now_s += 1.1 * cost_model().prefill_s(len(SHARED) * BLOCK_TOKENS + BLOCK_TOKENS + 1)
        assert q.order() == [1]

    def test_they_wait_for_the_last_pass_however_long_it_took(self) -> None:
        """Its results may be taken only after the next one was planned."""
        q = queue()
        self.gang(q, 2)
        q.order()
        q.admit(0)
        q.now_s += 60.0
        assert q.order() == []
        assert q.order() == [1]

    @pytest.mark.parametrize("how", ["aborted", "retracted", "finished"])
    def test_they_are_free_when_it_is_gone(self, how: str) -> None:
        q = queue()
        self.gang(q, 2)
        leader = q.waiting.get(0)
        q.order()
        q.admit(0)
        assert q.order() == []
        if how == "aborted":
            q.policy.on_abort(leader, q.now_s)
        elif how == "finished":
            q.policy.on_finish(leader, q.now_s)
        else:
            q.waiting.add(leader)
            q.policy.on_arrival(leader, q.now_s)
        assert q.order()[:1] == ([0] if how == "retracted" else [1])

    def test_little_in_common_keeps_nobody_back(self) -> None:
        q = queue()
        for request_id in range(2):
            q.arrive(request_id, [1, 2, 100 + request_id], slo=LOOSE)
        assert q.order() == [0, 1]

    def test_cheap_members_come_right_behind_the_most_urgent_one(self) -> None:
        q = queue()
        q.cache(SHARED)
        q.arrive(0, blocks(0), slo=LOOSE)
        q.now_s = 0.1
        q.arrive(1, [*SHARED, 50], slo=LOOSE)
        q.arrive(2, [*SHARED, 51], slo=TIGHT)
        assert q.order() == [2, 1, 0]

    def test_switched_off_each_stands_alone(self) -> None:
        q = queue(gangs=False)
        self.gang(q)
        assert q.order() == [0, 1, 2]


def test_tenants_get_the_same_where_no_deadline_decides() -> None:
    q = queue()
    for request_id in range(60):
        request = q.arrive(request_id, blocks(request_id, 4))
        request.tenant = "a" if request_id < 40 else "b"
    admitted = []
    for _ in range(30):
        admitted.append(q.order(limit=1)[0])
        q.admit(admitted[-1])
    assert 14 <= sum(request_id < 40 for request_id in admitted) <= 16


def test_the_forecast_names_the_next_prefixes_and_when() -> None:
    q = queue()
    q.cache([1, 2, 3, 4, 5])
    q.cache([11, 12])
    q.arrive(0, [11, 12, 77], slo=LOOSE)
    for request_id in (1, 2):
        q.arrive(request_id, [1, 2, 3, 4, 5, 60 + request_id], slo=TIGHT)
    q.arrive(3, blocks(3))
    state = q.state()
    q.policy.plan(state, 16)
    assert isinstance(q.policy, SlackPolicy)
    expected = q.policy.forecast(state).next_use
    gang, alone = q.waiting.get(1).path[-1].node_id, q.waiting.get(0).path[-1].node_id
    assert set(expected) == {gang, alone}
    assert expected[gang].starts_in_s == 0.0
    assert expected[alone].starts_in_s > 0.0
