"""What is cached of waiting requests is kept right without matching them all again."""

from __future__ import annotations

from array import array
from contextlib import suppress
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency
from tiered_kv.scheduler.request_policy import request_policies
from tiered_kv.scheduler.waiting import WaitingQueue


def queue() -> Queue:
    return Queue(request_policies.get("fcfs")())


def test_an_arrival_finds_what_device_then_host_have() -> None:
    q = queue()
    q.cache([1, 2])
    q.cache([1, 2, 3, 4], Tier.HOST)
    request = q.arrive(0, [1, 2, 3, 9])
    assert (request.device_tokens, request.host_tokens) == (2 * BLOCK_TOKENS, BLOCK_TOKENS)
    assert request.uncached_tokens == BLOCK_TOKENS + 1
    assert request.last_device_node.end == 2


def test_the_last_token_is_never_cached() -> None:
    q = queue()
    q.cache([1, 2])
    request = q.arrive(0, [1, 2], tokens=2 * BLOCK_TOKENS)
    assert request.device_tokens == 2 * BLOCK_TOKENS - 1
    assert request.uncached_tokens == 1


def test_an_insert_is_noticed_by_those_it_continues_only() -> None:
    q = queue()
    q.cache([1])
    near, far = q.arrive(0, [1, 2, 3]), q.arrive(1, [1, 5])
    result = q.forest.insert(q.root, array("q", [1, 2, 3]), range(3))
    assert q.waiting.changed(result.adopted) == [near]
    assert (near.device_tokens, far.device_tokens) == (3 * BLOCK_TOKENS, BLOCK_TOKENS)


def test_an_eviction_is_noticed_by_those_below() -> None:
    q = queue()
    q.cache([1])
    q.cache([1, 2])
    request, other = q.arrive(0, [1, 2, 3]), q.arrive(1, [1, 7])
    node = request.path[-1]
    q.forest.evict(node, Tier.DEVICE)
    assert q.waiting.changed([node]) == [request]
    assert (request.device_tokens, other.device_tokens) == (BLOCK_TOKENS, BLOCK_TOKENS)
    # It waits at the node above now, and is found there.
    result = q.forest.insert(q.root, array("q", [1, 2]), range(2))
    assert q.waiting.changed(result.adopted) == [request]
    assert request.device_tokens == 2 * BLOCK_TOKENS


def test_a_prefix_that_ends_inside_a_node_is_found_and_the_node_stays_whole() -> None:
    q = queue()
    q.cache([1, 2, 3, 4])
    (node,) = q.forest.nodes()
    request, shorter = q.arrive(0, [1, 2, 9]), q.arrive(1, [1])
    assert (request.device_tokens, request.path, request.inside) == (2 * BLOCK_TOKENS, (), node)
    assert (node.n_pages, node.hits, node.last_access) == (4, 0, 1)
    # Somebody else's prompt divides the node above the point where the first one leaves it.
    q.cache([1, 7])
    result = q.forest.insert(q.root, array("q", [1, 2, 9]), range(3))
    assert q.waiting.changed(result.adopted) == [request]
    assert request.device_tokens == 3 * BLOCK_TOKENS
    q.forest.evict(node, Tier.DEVICE)
    assert q.waiting.changed([node]) == []
    assert shorter.device_tokens == BLOCK_TOKENS


def test_whoever_ends_inside_a_node_is_found_in_its_upper_parts() -> None:
    q = queue()
    q.cache([1, 2, 3, 4, 5, 6])
    (node,) = q.forest.nodes()
    requests = [q.arrive(n, [1, 2, 3, 4, 5, 6][:n]) for n in range(1, 7)]
    for n in (2, 4):
        q.cache([1, 2, 3, 4, 5, 6][:n])
    q.forest.evict(node, Tier.DEVICE)
    assert q.waiting.changed([node]) == requests[4:]
    assert [r.device_tokens // BLOCK_TOKENS for r in requests] == [1, 2, 3, 4, 4, 4]
    upper, lower = requests[5].path
    q.forest.evict(lower, Tier.DEVICE)
    assert q.waiting.changed([lower]) == requests[2:]
    assert [r.device_tokens // BLOCK_TOKENS for r in requests] == [1, 2, 2, 2, 2, 2]
    q.forest.evict(upper, Tier.DEVICE)
    assert q.waiting.changed([upper]) == requests


def test_a_change_of_a_shared_prefix_compares_no_prompt_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = queue()
    q.cache([1, 2, 3])
    requests = [q.arrive(n, [1, 2, 3, 100 + n]) for n in range(50)]
    (node,) = q.forest.nodes()
    monkeypatch.setattr(q.forest, "peek", lambda *_: pytest.fail("looked up"))
    q.forest.set_resident(node, Tier.HOST, range(3))
    assert q.waiting.changed([node]) == [], "as much is cached as before"
    q.forest.evict(node, Tier.DEVICE)
    assert q.waiting.changed([node]) == requests
    assert {(r.device_tokens, r.host_tokens) for r in requests} == {(0, 3 * BLOCK_TOKENS)}
    q.forest.evict(node, Tier.HOST)
    assert q.waiting.changed([node]) == requests
    assert {r.cached_tokens for r in requests} == {0}
    monkeypatch.undo()
    q.cache([1, 2, 3])
    assert q.waiting.changed(q.forest.nodes()) == requests
    assert {r.device_tokens for r in requests} == {3 * BLOCK_TOKENS}


def test_what_is_still_on_its_way_to_the_host_is_not_cached_yet() -> None:
    q = queue()
    q.cache([1])
    tail = array("q", [2, 3])
    nodes = q.forest.extend(q.forest.nodes()[0], tail, Tier.HOST, Residency.LOADING, range(2), 7)
    request = q.arrive(0, [1, 2, 3, 4])
    assert request.cached_tokens == BLOCK_TOKENS
    came, _ = q.forest.finish_leading(7, Tier.HOST, 1)
    assert q.waiting.changed([*came, *nodes]) == [request]
    assert (request.device_tokens, request.host_tokens) == (BLOCK_TOKENS, BLOCK_TOKENS)


def test_who_left_the_queue_is_not_looked_up() -> None:
    q = queue()
    q.arrive(0, [1, 2])
    q.admit(0)
    result = q.forest.insert(q.root, array("q", [1, 2]), range(2))
    assert q.waiting.changed(result.adopted) == []
    assert len(q.waiting) == 0


PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=8)
STEPS = st.one_of(
    st.tuples(st.just("arrive"), PROMPTS),
    st.tuples(st.just("insert"), PROMPTS),
    st.tuples(st.just("evict device"), st.integers(0, 100)),
    st.tuples(st.just("evict host"), st.integers(0, 100)),
    st.tuples(st.just("write"), st.integers(0, 100)),
    st.tuples(st.just("read"), PROMPTS),
    st.tuples(st.just("leave"), st.integers(0, 100)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_it_always_says_what_a_fresh_match_would(steps: list[tuple[str, object]]) -> None:
    q = queue()
    forest = q.forest
    for number, (what, choice) in enumerate(steps):
        changed = []
        if what == "arrive":
            q.arrive(number, choice)
        elif what == "insert":
            tokens = array("q", choice)
            changed = list(forest.insert(q.root, tokens, range(len(tokens))).adopted)
        elif what == "leave" and len(q.waiting):
            q.admit(list(q.waiting.requests)[choice % len(q.waiting)])
        elif what.startswith("evict"):
            tier = Tier[what.split()[1].upper()]
            if leaves := list(forest.leaves(tier)):
                changed = [leaves[choice % len(leaves)]]
                forest.evict(changed[0], tier)
        elif what == "write":
            nodes = [n for n in forest.nodes() if n.state(Tier.HOST) is Residency.ABSENT]
            nodes = [n for n in nodes if n.state(Tier.DEVICE) is Residency.RESIDENT]
            if nodes:
                changed = [nodes[choice % len(nodes)]]
                forest.set_resident(changed[0], Tier.HOST, range(changed[0].n_pages))
        elif what == "read":
            tokens = array("q", choice)
            with suppress(IntegrityError):  # part of it is there already
                forest.extend(q.root, tokens, Tier.HOST, Residency.LOADING, range(len(tokens)), 1)
            changed = forest.finish_leading(1, Tier.HOST, number % (len(tokens) + 1))[0]
        q.waiting.changed(changed)
        before = forest.view()
        anew = WaitingQueue(forest, tokens_per_unit=BLOCK_TOKENS)
        for request in q.waiting:
            fresh = replace(request)
            anew.add(fresh)
            assert request.device_tokens == fresh.device_tokens
            assert request.host_tokens == fresh.host_tokens
        assert forest.view() == before
    forest.check_integrity()
    for request in list(q.waiting):
        q.waiting.remove(request)
    assert not any((q.waiting._places, q.waiting._through, q.waiting._lacking))


def test_who_lost_something_is_named_once_and_only_if_asked_for() -> None:
    q = queue()
    q.cache([1])
    q.cache([1, 2])
    loser, other, gone = q.arrive(0, [1, 2, 3]), q.arrive(1, [1, 7]), q.arrive(2, [1, 2, 4])
    assert q.waiting.take_lost([0, 1, 2]) == []
    node = loser.path[-1]
    q.forest.evict(node, Tier.DEVICE)
    q.waiting.changed([node])
    assert q.waiting.take_lost([1]) == []
    q.waiting.remove(gone)
    assert q.waiting.take_lost([2, 0, 1]) == [loser]
    assert q.waiting.take_lost([0, 1]) == []
    assert other.device_tokens == BLOCK_TOKENS
