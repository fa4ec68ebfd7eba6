"""Prefetch as decisions alone: stores that only note what they are asked, and a clock by hand."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import pytest

from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash, page_hashes
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.cold_source import Read
from tiered_kv.memory.manager import PATIENCE_S, MemoryManager
from tiered_kv.memory.prefetch import LINE_LOOK, PrefetchPlanner
from tiered_kv.memory.probes import Probes
from tiered_kv.memory.read_order import Pages, Urgency
from tiered_kv.memory.stored_pages import Stored
from tiered_kv.tiers.slots import SlotAllocator

N_HOST = 20


@dataclass(eq=False)
class Store:
    """A `ColdSource` that has everything."""

    tier: Tier = Tier.DISK
    probes: Probes = field(default_factory=Probes)
    page_bytes: int = 1
    is_away: bool = False
    reads: dict[int, tuple[Read, Urgency]] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)

    @property
    def n_reads(self) -> int:
        return len(self.reads)

    def pages_before(self, urgency: Urgency) -> int:
        return sum(len(read.hashes) for read, other in self.reads.values() if other <= urgency)

    def begin(self, read: Read, urgency: Urgency) -> None:
        self.reads[read.op] = read, urgency

    def hurry(self, op: int, urgency: Urgency) -> None:
        read, before = self.reads[op]
        self.reads[op] = read, min(before, urgency)

    def forget(self, op: int, *, is_probe: bool) -> None:
        self.forgotten.append(op)


class Machine:
    """A `HostRoom` of `N_HOST` pages, and what the store has of `StoreLookups`."""

    def __init__(self, n_stored: int = 1000) -> None:
        self.forest = Forest(1)
        self.root = self.forest.root(namespace_hash("test"))
        self.manager = MemoryManager(self.forest, MemoryConfig())
        self.now_s = 0.0
        self.store = Store()
        self.n_stored = n_stored
        self.answers_later = False
        self.urgencies: dict[str, Urgency] = {}
        self._slots = SlotAllocator(N_HOST)
        self._n_ops = 0
        self.planner = PrefetchPlanner(self.forest, self, self, [self.store], N_HOST)
        self.planner.urgency_of = self.urgencies.get

    def next_op(self) -> int:
        self._n_ops += 1
        return self._n_ops

    def alloc_host(self, n_pages: int, keep: Node | None = None) -> Pages | None:
        return self._slots.alloc(n_pages)

    def free_host(self, pages: Pages) -> None:
        self._slots.free(pages)

    def stored(self, nodes: list[Node], tier: Tier) -> None:
        assert all(node.state(tier) is Residency.RESIDENT for node in nodes)

    def may_hit(self, anchor: Node, first: Tokens) -> bool:
        return self.n_stored > 0

    def stored_of(self, root: Node, tokens: Tokens, first: int) -> Stored:
        end = min(len(tokens), self.n_stored)
        ends = ((Tier.DISK, end),) if end > first else ()
        return Stored(first, ends, page_hashes(root.last_page_hash, tokens, 1))

    def ask(self, rid: str, root: Node, tokens: array[int], anchor: Node) -> Stored | None:
        return None if self.answers_later else self.stored_of(root, tokens, anchor.end)

    # -- what happens -------------------------------------------------------------------------

    def arrive(self, rid: str, *pages: int, urgency: float = 0.0) -> None:
        self.urgencies[rid] = (urgency, float(len(self.urgencies)))
        self.planner.request(rid, self.root, array("q", pages))
        self.planner.advance()

    def came(self, op: int, n_pages: int | None = None) -> None:
        """A read is over."""
        read, _ = self.store.reads.pop(op)
        n_done = len(read.hashes) if n_pages is None else n_pages
        assert self.planner.read_ended(op, n_done) is Tier.DISK

    def reads(self) -> dict[int, int]:
        return {op: len(read.hashes) for op, (read, _) in self.store.reads.items()}


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_a_request_is_held_until_its_pages_are_there(machine: Machine) -> None:
    planner = machine.planner
    machine.arrive("a", 1, 2, 3)
    assert machine.reads() == {1: 3}
    assert not planner.done("a")
    assert planner.arriving("a")[1] == 3
    assert planner.take_news() == ["a"]
    machine.came(1)
    assert planner.take_news() == ["a"]
    assert planner.done("a")
    assert planner.loaded_tokens("a") == 3
    assert machine.forest.evictable_tokens(Tier.HOST) == 0, "held until it runs"
    planner.release("a")
    assert machine.forest.evictable_tokens(Tier.HOST) == 3


def test_pages_that_two_want_are_read_once(machine: Machine) -> None:
    machine.arrive("a", 1, 2, 3)
    machine.arrive("b", 1, 2, 3, 4)
    assert machine.reads() == {1: 3, 2: 1}
    assert machine.planner.reads_alone("a") == []
    assert machine.planner.reads_alone("b") == [2]
    machine.planner.release("a")
    assert machine.store.forgotten == [], "the other one waits for it"
    machine.planner.release("b")
    assert machine.store.forgotten == [1, 2]


def test_what_comes_short_is_a_miss_and_the_rest_is_given_back(machine: Machine) -> None:
    machine.arrive("a", 1, 2, 3, 4)
    machine.came(1, 2)
    assert machine.planner.done("a")
    assert machine.planner.loaded_tokens("a") == 2
    assert machine.forest.resident_tokens(Tier.HOST) == 2
    assert machine.alloc_host(N_HOST - 2) is not None


def test_half_of_the_host_is_held_and_the_more_urgent_take_it(machine: Machine) -> None:
    planner = machine.planner
    machine.arrive("a", *range(10, 17), urgency=2.0)
    machine.came(1)
    machine.arrive("late", *range(20, 27), urgency=3.0)
    assert machine.reads() == {}, "7 of 10 pages are held"
    assert planner.done("late"), "who stands in line is not kept from running"
    machine.arrive("soon", *range(30, 37), urgency=1.0)
    assert machine.reads() == {2: 7}
    assert machine.forest.evictable_tokens(Tier.HOST) == 7, "a's pages are ordinary cache now"
    planner.release("soon")
    planner.advance()
    assert planner.is_settled("a"), "it is held for again, as nothing has gone"
    assert not planner.is_settled("late")
    planner.release("a")
    planner.advance()
    assert not planner.done("late")


def test_those_who_fit_pass_some_who_do_not(machine: Machine) -> None:
    machine.arrive("holder", *range(10, 18))
    machine.came(1)
    for n in range(LINE_LOOK - 1):
        machine.arrive(f"large {n}", *range(100 * n + 100, 100 * n + 106), urgency=1.0)
    machine.arrive("small", 1, 2, urgency=2.0)
    assert machine.reads() == {2: 2}
    machine.arrive("last large", *range(1000, 1006), urgency=1.0)
    machine.arrive("second small", 5, urgency=2.0)
    assert machine.planner.is_settled("second small") is False, "it is not looked at"


def test_patience_runs_from_the_arrival(machine: Machine) -> None:
    planner = machine.planner
    machine.now_s = 100.0
    machine.arrive("a", 1, 2, 3)
    assert planner.next_end_s == 100.0 + PATIENCE_S
    machine.now_s = 100.0 + PATIENCE_S
    planner.advance()
    assert not planner.done("a")
    machine.now_s = float(np.nextafter(machine.now_s, np.inf))
    planner.advance()
    assert planner.done("a")
    assert machine.store.forgotten == [], "what is on its way still comes for it"


def test_an_answer_that_comes_later_counts_only_for_whom_it_is(machine: Machine) -> None:
    planner = machine.planner
    machine.answers_later = True
    machine.arrive("a", 1, 2, 3)
    assert not planner.done("a")
    asked = planner.tickets["a"].tokens
    planner.release("a")
    machine.arrive("a", 1, 2, 3)
    assert not planner.is_asked("a", asked), "another request of that name"
    assert planner.is_asked("a", planner.tickets["a"].tokens)
    planner.answered("a", machine.stored_of(machine.root, asked, 0))
    planner.advance()
    assert machine.reads() == {1: 3}


def test_nothing_is_read_from_a_store_that_was_put_away(machine: Machine) -> None:
    machine.answers_later = True
    machine.arrive("a", 1, 2, 3)
    machine.store.is_away = True
    machine.planner.answered("a", machine.stored_of(machine.root, array("q", [1, 2, 3]), 0))
    machine.planner.advance()
    assert machine.reads() == {}
    assert machine.planner.done("a")
    assert machine.planner.is_settled("a")


def test_behind_a_flush_the_pages_are_given_back(machine: Machine) -> None:
    machine.arrive("a", 1, 2, 3)
    machine.planner.clear()
    assert machine.planner.take_news() == ["a"]
    machine.forest.clear()
    machine.planner.read_ended_behind_flush(1, 3)
    assert machine.alloc_host(N_HOST) is not None


def test_who_lost_what_it_found_is_looked_up_again_and_not_kept_from_running() -> None:
    machine = Machine(n_stored=0)
    planner, prompt = machine.planner, array("q", [1, 2, 3])
    machine.arrive("a", *prompt)
    assert planner.tickets == {}, "no store had anything when it came"
    machine.n_stored = 1000
    planner.request_again("a", machine.root, prompt)
    planner.advance()
    assert machine.reads() == {1: 3}
    assert planner.done("a"), "its patience runs from its arrival"
    machine.came(1)
    assert planner.loaded_tokens("a") == 3
    assert machine.forest.evictable_tokens(Tier.HOST) == 0, "held until it runs"
    planner.request_again("a", machine.root, prompt)
    planner.advance()
    assert machine.reads() == {}, "what it holds cannot leave"
    planner.release("a")


def test_who_was_looked_up_in_vain_is_looked_up_again() -> None:
    machine = Machine(n_stored=1)
    planner, prompt = machine.planner, array("q", [1, 2, 3])
    machine.arrive("a", *prompt)
    machine.came(1, 0)
    machine.n_stored = 3
    assert planner.is_settled("a")
    pinned = planner.tickets["a"].pinned
    planner.request_again("a", machine.root, prompt)
    planner.advance()
    assert (machine.reads() == {2: 3}) == (pinned is None)


def test_who_stands_in_line_is_not_put_there_twice(machine: Machine) -> None:
    machine.arrive("holder", *range(10, 20), urgency=0.0)
    machine.arrive("late", *range(20, 27), urgency=3.0)
    before = machine.planner.tickets["late"]
    machine.planner.request_again("late", machine.root, array("q", range(20, 27)))
    assert machine.planner.tickets["late"] is before
