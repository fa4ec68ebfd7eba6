"""Who is read for next, and who makes room: decisions on names, urgencies and page ids."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from tiered_kv.memory.read_order import LEAST_URGENT, Pages, ReadOrder, Urgency

ROOM = 10


def pages(*ids: int) -> Pages:
    return np.array(ids, dtype=np.int64)


def run(first: int, n: int) -> Pages:
    return np.arange(first, first + n, dtype=np.int64)


class Order(ReadOrder):
    """With urgencies by name."""

    def __init__(self, **urgencies: float) -> None:
        self.urgencies: dict[str, Urgency] = {n: (0.0, u) for n, u in urgencies.items()}
        super().__init__(100, ROOM, lambda name: self.urgencies.get(name, LEAST_URGENT))


def test_the_line_is_in_the_order_of_urgency_then_of_arrival() -> None:
    order = Order(a=2, b=1, c=2, d=0)
    for name in "abcd":
        order.wait(name)
    assert order.first_in_line(10) == ["d", "b", "a", "c"]
    assert order.first_in_line(2) == ["d", "b"]
    order.leave_line("b")
    assert (order.first_in_line(2), order.n_in_line) == (["d", "a"], 3)
    assert not order.is_in_line("b")


def test_who_has_become_less_urgent_is_passed() -> None:
    order = Order(a=1, b=2, c=3)
    for name in "abc":
        order.wait(name)
    order.urgencies["a"] = (1.0, 0.0)
    order.urgencies["b"] = (0.0, 9.0)
    assert order.first_in_line(1) == ["c"]
    assert order.first_in_line(3) == ["c", "b", "a"]


def test_there_is_room_for_what_is_held_already() -> None:
    order = Order(a=1, b=1)
    order.hold("a", run(0, 8))
    assert order.free_pages == 2
    assert order.make_room("b", run(0, 8), 2) == []
    assert order.make_room("b", run(0, 8), 3) is None
    order.hold("b", run(0, 10))
    assert order.free_pages == 0
    order.let_go("a")
    assert order.free_pages == 0, "b holds all of it"
    order.let_go("b")
    assert order.free_pages == ROOM


def test_the_least_urgent_make_room_and_no_more_of_them_than_need_be() -> None:
    order = Order(a=1, b=2, c=3, d=4, e=2)
    for at, name in enumerate("abcd"):
        order.hold(name, run(10 * at, 2))
    assert order.make_room("e", pages(), 2) == []
    assert order.make_room("e", pages(), 3) == ["d"]
    assert order.make_room("e", pages(), 6) == ["d", "c"]
    assert order.make_room("e", pages(), 7) is None, "b is as urgent as it is"
    assert order.free_pages == 2, "nothing has happened yet"


def test_pages_that_two_hold_are_free_when_both_let_go() -> None:
    order = Order(a=0, x=5, y=4)
    order.hold("x", run(0, 10))
    order.hold("y", run(0, 9))
    assert order.make_room("a", pages(), 1) == ["x"]
    assert order.make_room("a", pages(), 2) == ["x", "y"]


def test_who_has_become_more_urgent_keeps_its_room() -> None:
    order = Order(a=1, x=2, y=3)
    order.hold("x", run(0, 5))
    order.hold("y", run(5, 5))
    order.urgencies["y"] = (0.0, 0.5)
    assert order.make_room("a", pages(), 5) == ["x"]
    assert order.make_room("a", pages(), 6) is None


def test_who_has_become_less_urgent_than_others_makes_room() -> None:
    order = Order(a=3, x=1, y=2)
    order.hold("x", run(0, 5))
    order.hold("y", run(5, 5))
    order.urgencies["x"] = (1.0, 0.0)
    assert order.make_room("a", pages(), 5) == ["x"]


def test_patience_ends_once_and_at_the_time_that_was_set_last() -> None:
    order = Order()
    order.wait_until("a", 1.0)
    order.wait_until("b", 2.0)
    order.wait_until("a", 3.0)
    order.wait_until("gone", 1.5)
    order.drop("gone")
    assert order.out_of_patience(1.9) == []
    assert order.out_of_patience(2.5) == ["b"]
    assert order.out_of_patience(9.0) == ["a"]
    assert order.out_of_patience(9.0) == []


NAMES = st.sampled_from("abcdef")
PAGES = st.lists(st.integers(0, 14), max_size=ROOM, unique=True)
STEPS = st.one_of(
    st.tuples(st.just("ask"), NAMES, PAGES, st.integers(0, 6)),
    st.tuples(st.just("let go"), NAMES),
    st.tuples(st.just("urgency"), NAMES, st.integers(0, 4)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_room_is_counted_once_and_goes_to_the_more_urgent(steps: Sequence[tuple]) -> None:
    order = Order()
    held: dict[str, set[int]] = {}
    new_page = 20
    for what, name, *more in steps:
        if what == "let go":
            order.let_go(name)
            held.pop(name, None)
        elif what == "urgency":
            if name in held:
                continue
            order.urgencies[name] = (0.0, float(more[0]))
        else:
            order.let_go(name)
            held.pop(name, None)
            known, n_new = more
            urgency = order.urgencies.get(name, LEAST_URGENT)
            above = {n for n in held if order.urgencies.get(n, LEAST_URGENT) <= urgency}
            kept = set().union(*(held[n] for n in above))
            displaced = order.make_room(name, pages(*known), n_new)
            assert (displaced is None) == (len(kept | set(known)) + n_new > ROOM)
            if displaced is None:
                continue
            assert not above.intersection(displaced)
            for other in displaced:
                order.let_go(other)
                del held[other]
            held[name] = set(known) | set(range(new_page, new_page + n_new))
            new_page = 20 + (new_page + n_new - 20) % 60
            if n_new and new_page < 20 + n_new:
                return  # page ids of this test are used up
            order.hold(name, pages(*held[name]))
        assert ROOM - order.free_pages == len(set().union(*held.values(), set()))
