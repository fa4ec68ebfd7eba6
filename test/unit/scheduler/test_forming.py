"""Branches of one fork are admitted together, and nobody waits long for those who never come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support_simulation.slack_queue import blocks, queue
from tiered_kv.scheduler.forming import FORMING_S, Forming
from tiered_kv.scheduler.request import QueuedRequest


def branch(request_id: int, branches: int, parent: str = "p") -> QueuedRequest:
    return queue().arrive(
        request_id, blocks(request_id, 1), parent_program=parent, branches=branches
    )


def test_they_wait_until_all_are_there() -> None:
    forming = Forming()
    for i in range(2):
        forming.arrived(branch(i, 3), 0.0)
    assert 0 in forming
    assert 1 in forming
    forming.arrived(branch(2, 3), 0.01)
    assert len(forming) == 0


def test_they_wait_no_longer_than_the_first_one_may() -> None:
    forming = Forming()
    forming.arrived(branch(0, 3), 1.0)
    forming.arrived(branch(1, 3), 1.0 + FORMING_S / 2)
    forming.expire(1.0 + FORMING_S * 0.9)
    assert len(forming) == 2
    forming.expire(1.0 + FORMING_S)
    assert len(forming) == 0


def test_who_left_came_all_the_same() -> None:
    forming = Forming()
    forming.arrived(branch(0, 3), 0.0)
    forming.arrived(branch(1, 3), 0.0)
    forming.left(1)
    forming.left(1)
    assert 0 in forming
    forming.arrived(branch(2, 3), 0.0)
    assert len(forming) == 0


def test_others_have_nothing_to_wait_for() -> None:
    forming = Forming()
    forming.arrived(branch(0, 1), 0.0)
    forming.arrived(branch(1, 3, parent=""), 0.0)
    back = branch(2, 3)
    back.admitted_s = 0.0
    forming.arrived(back, 1.0)
    assert len(forming) == 0


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("come"), st.integers(1, 4), st.sampled_from(["a", "b"])),
            st.tuples(st.just("leave"), st.integers(0, 20), st.just("")),
            st.tuples(st.just("time"), st.integers(1, 60), st.just("")),
        ),
        max_size=40,
    )
)
def test_whatever_happens_nobody_waits_beyond_the_bound(
    events: list[tuple[str, int, str]],
) -> None:
    forming, now_s, came_s = Forming(), 0.0, {}
    for what, n, parent in events:
        if what == "come":
            request = branch(len(came_s), n, parent)
            came_s[request.request_id] = now_s
            forming.arrived(request, now_s)
        elif what == "leave":
            forming.left(n)
            assert n not in forming
        else:
            now_s += n / 1000
        forming.expire(now_s)
        waiting = [i for i in came_s if i in forming]
        assert len(waiting) == len(forming)
        assert all(now_s - came_s[i] < FORMING_S for i in waiting)


def test_the_policy_admits_nobody_of_a_gang_that_is_incomplete() -> None:
    q = queue()
    for i in range(2):
        q.arrive(i, blocks(i, 1), parent_program="p", branches=3)
    q.arrive(2, blocks(2, 1))
    plan = q.plan()
    assert plan.order == (2,)
    assert plan.waits_for_gangs
    q.arrive(3, blocks(3, 1), parent_program="p", branches=3)
    plan = q.plan()
    assert sorted(plan.order) == [0, 1, 2, 3]
    assert not plan.waits_for_gangs


@pytest.mark.parametrize(("shared", "first"), [(4, 1), (0, 3)])
def test_what_they_share_is_computed_once_if_that_is_sooner(shared: int, first: int) -> None:
    q = queue(share_min_tokens=100_000)
    prefix = blocks(99, shared)
    for i in range(3):
        q.arrive(i, [*prefix, *blocks(i, 1)], parent_program="p", branches=3)
    assert len(q.order()) == first


def test_nobody_overtakes_the_one_that_computes_for_all() -> None:
    """While its pass is under way nobody runs, and the others are kept back all the same."""
    q = queue(share_min_tokens=100_000)
    for i in range(3):
        q.arrive(i, [*blocks(99, 4), *blocks(i, 1)], parent_program="p", branches=3)
    (leader,) = q.order()
    q.admit(leader)
    plan = q.plan()
    assert plan.order == ()
    assert plan.waits_for_gangs
    q.now_s = 1000.0
    assert len(q.order()) > 0


def test_who_shares_as_much_without_having_said_so_is_not_kept_back() -> None:
    q = queue(share_min_tokens=100_000)
    for i in range(3):
        q.arrive(i, [*blocks(99, 4), *blocks(i, 1)])
    assert len(q.order()) == 3
