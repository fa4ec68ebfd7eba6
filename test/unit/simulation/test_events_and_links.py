"""The clock and the links between tiers: order, durations, cancelling."""

from __future__ import annotations

import pytest

from tiered_kv.scheduler.cost_model import EdgeCost
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.transfers import Link


def run(events: EventQueue) -> None:
    while events.fire_next():
        pass


class TestEventQueue:
    def test_events_fire_by_time_then_in_the_order_of_scheduling(self) -> None:
        events, fired = EventQueue(), []
        for name, at_s in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
            events.schedule(at_s, lambda now_s, name=name: fired.append((name, now_s)))
        run(events)
        assert fired == [("a", 1.0), ("b", 2.0), ("c", 2.0)]
        assert events.now() == 2.0

    def test_an_event_in_the_past_happens_now(self) -> None:
        events, fired = EventQueue(), []
        events.schedule(5.0, lambda _: events.schedule(1.0, fired.append))
        run(events)
        assert fired == [5.0]

    def test_a_cancelled_event_does_not_happen(self) -> None:
        events, fired = EventQueue(), []
        first = events.schedule(1.0, fired.append)
        events.schedule(2.0, fired.append)
        events.cancel(first)
        assert len(events) == 1
        run(events)
        assert fired == [2.0]


class TestLink:
    def link(self) -> tuple[EventQueue, Link, list[tuple[str, float]]]:
        events = EventQueue()
        return events, Link("test", EdgeCost(100.0, 0.5), events), []

    def test_transfers_queue_and_each_pays_latency_and_bandwidth(self) -> None:
        events, link, done = self.link()
        link.submit(100, lambda at_s: done.append(("a", at_s)))
        link.submit(200, lambda at_s: done.append(("b", at_s)))
        assert link.expected_end_s() == pytest.approx(4.0)
        assert link.queued_bytes == 300
        run(events)
        assert done == [("a", pytest.approx(1.5)), ("b", pytest.approx(4.0))]
        assert (link.n_bytes, link.queued_bytes, len(link)) == (300, 0, 0)
        assert link.busy_s == pytest.approx(4.0)
        assert link.expected_end_s() == events.now()

    def test_cancelling_the_one_under_way_tells_its_share_and_starts_the_next(self) -> None:
        events, link, done = self.link()
        first = link.submit(200, lambda at_s: done.append(("a", at_s)))
        link.submit(100, lambda at_s: done.append(("b", at_s)))
        shares = []
        events.schedule(1.5, lambda _: shares.append(link.cancel(first)))
        run(events)
        # Half a second of latency, then one of its two seconds of streaming.
        assert shares == [pytest.approx(0.5)]
        assert done == [("b", pytest.approx(3.0))]
        assert link.n_bytes == 200

    def test_cancelling_one_that_waits_leaves_the_others(self) -> None:
        events, link, done = self.link()
        link.submit(100, lambda at_s: done.append(("a", at_s)))
        second = link.submit(100, lambda at_s: done.append(("b", at_s)))
        link.submit(100, lambda at_s: done.append(("c", at_s)))
        assert link.cancel(second) == 0.0
        run(events)
        assert done == [("a", pytest.approx(1.5)), ("c", pytest.approx(3.0))]
