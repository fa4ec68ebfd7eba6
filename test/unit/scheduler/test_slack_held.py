"""To wait for pages from disk has a price and a limit: who is computed instead, and who is not."""

from __future__ import annotations

import pytest

from support_simulation import builders
from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.cost_model import Correction
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.request_policy import Arriving
from tiered_kv.scheduler.slack import price

PROMPT = list(range(100, 160))


def queue(**changes: object) -> Queue:
    return Queue(SlackPolicy(SlackConfig(**changes)))  # type: ignore[arg-type]


def work_s(q: Queue, request_id: int, tokens: int = 0) -> float:
    return price(q.waiting.get(request_id), q.state().costs, tokens).work_s


def held(q: Queue, deadline_s: float, ready_s: float, n_blocks: int = 59) -> list[int]:
    """The order with one whose first token is due then, and whose pages come then."""
    q.arrive(0, PROMPT, slo=Slo("standard", deadline_s, None))
    q.hold(0, ready_s=ready_s, tokens=n_blocks * BLOCK_TOKENS)
    return q.order()


def test_who_will_have_its_pages_in_time_waits_for_them() -> None:
    q = queue()
    assert held(q, 1.0, 0.9) == []


def test_who_will_not_is_computed_while_there_is_time() -> None:
    q = queue()
    assert held(q, 1.0, 1.1) == [0]


def test_what_is_left_to_compute_after_its_pages_counts() -> None:
    q = queue()
    q.arrive(0, PROMPT, slo=Slo("standard", 1.0, None))
    half = 30 * BLOCK_TOKENS
    left_s = work_s(q, 0, half)
    assert 0.0 < left_s < work_s(q, 0)
    for ready_s, order in ((1.0 - 1.1 * left_s, []), (1.0 - 0.9 * left_s, [0])):
        q.hold(0, ready_s=ready_s, tokens=half)
        assert q.order() == order


def test_pages_come_no_later_where_passes_take_the_same_whatever_is_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A small model on a large machine: prefill in passes takes ten thousand times its work."""
    costs = builders.cost_model()
    costs.correct(prefill=Correction(0.05, 1e-6))
    monkeypatch.setattr(builders, "cost_model", lambda: costs)
    assert held(queue(), 20.0, 0.01) == []
    assert held(queue(), 20.0, 25.0) == [0]


def test_who_would_be_late_either_way_waits() -> None:
    q = queue()
    assert held(q, 0.01, 0.5) == []


def test_pages_that_are_late_are_given_up_before_the_latest_start() -> None:
    q = queue()
    assert held(q, 1.0, 0.3) == []
    latest_start_s = 1.0 - work_s(q, 0)
    given_up_s = None
    while q.now_s < latest_start_s:
        q.now_s += 0.005
        if q.order() == [0]:
            given_up_s = q.now_s
            break
    assert given_up_s is not None
    assert 0.3 < given_up_s < latest_start_s


def test_who_is_overdue_waits_for_nothing() -> None:
    q = queue(max_wait_s=5.0)
    q.arrive(0, PROMPT)
    q.hold(0, ready_s=1e9)
    assert q.order() == []
    q.now_s = 5.1
    plan = q.plan()
    assert (plan.order, plan.first_or_none) == ((0,), True)


def test_whoever_is_overdue_first_is_the_one_whose_turn_it_is_held_or_not() -> None:
    q = queue(max_wait_s=5.0)
    for request_id in range(3):
        q.arrive(request_id, PROMPT)
        q.now_s += 0.1
    q.hold(0, ready_s=1e9)
    q.now_s = 20.0
    assert q.order() == [0, 1, 2]
    q.admit(0)
    assert q.plan().first_or_none is False, "they have had more than their share"


def test_nobody_is_insisted_on_before_somebody_is_overdue() -> None:
    q = queue()
    q.arrive(0, PROMPT)
    assert q.plan().first_or_none is False


def test_those_who_wait_for_pages_count_in_no_ones_way() -> None:
    """Their deadlines are met by waiting: others are chosen as if they were not there."""
    q = queue()
    q.arrive(9, PROMPT)
    two_s = Slo("two fit", 2.5 * work_s(q, 9), None)
    q.admit(9)
    for request_id in range(4):
        q.arrive(request_id, [1000 * request_id + n for n in range(60)], slo=two_s)
    q.arrive(4, [4000], slo=Slo("later", 10.0 * two_s.ttft_s, None))
    assert q.plan().order == (2, 3, 4, 0, 1)
    q.hold(2, 3, ready_s=0.0, tokens=59 * BLOCK_TOKENS)
    assert q.plan().order == (0, 1, 4)


def test_what_has_come_is_priced_as_cached() -> None:
    q = queue()
    assert held(q, 1.0, 0.5) == []
    q.cache(PROMPT[:59], Tier.HOST)
    q.held.clear()
    for request in q.waiting.changed(q.forest.nodes()):
        q.policy.on_cached_change(request, 0.5)
    q.now_s = 0.95
    q.arrive(1, [7000], slo=Slo("later", 60.0, None))
    assert q.order() == [0, 1], "it can still be in time"


@pytest.mark.parametrize(
    ("now_s", "needed_s", "latest_start_s", "expected"),
    [
        (1.0, 2.0, 1.5, True),
        (1.0, 1.9, 1.5, False),
        (2.0, 2.0, 0.0, True),
        (2.1, 2.3, 2.3, True),
        (2.2, 2.3, 2.3, False),
        (2.1, 9.0, 2.15, False),
    ],
)
def test_when_pages_are_expected_in_time(
    now_s: float, needed_s: float, latest_start_s: float, expected: bool
) -> None:
    assert Arriving(2.0, 64).is_in_time(now_s, needed_s, latest_start_s) is expected


def test_who_is_read_for_first() -> None:
    q = queue()
    late = q.arrive(0, PROMPT, slo=Slo("a", 0.3, None))
    soon = q.arrive(1, PROMPT, slo=Slo("a", 1.0, None))
    later = q.arrive(2, PROMPT, slo=Slo("b", 5.0, None))
    q.now_s = 0.5
    none = q.arrive(3, PROMPT[:10])
    long = q.arrive(4, PROMPT)
    q.order()
    in_order = sorted((none, long, late, later, soon), key=q.policy.urgency)
    assert [request.request_id for request in in_order] == [1, 2, 0, 3, 4]
