"""What is cached of waiting requests is kept right without matching them all again."""

from __future__ import annotations

from array import array
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency
from tiered_kv.scheduler.request_policy import request_policies


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


def test_who_left_the_queue_is_not_looked_up() -> None:
    q = queue()
    q.arrive(0, [1, 2])
    q.admit(0)
    result = q.forest.insert(q.root, array("q", [1, 2]), range(2))
    assert q.waiting.changed(result.adopted) == []
    assert len(q.waiting) == 0


PROMPTS = st.lists(st.integers(1, 3), min_size=1, max_size=6)
STEPS = st.one_of(
    st.tuples(st.just("arrive"), PROMPTS),
    st.tuples(st.just("insert"), PROMPTS),
    st.tuples(st.just("evict device"), st.integers(0, 100)),
    st.tuples(st.just("evict host"), st.integers(0, 100)),
    st.tuples(st.just("write"), st.integers(0, 100)),
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
        q.waiting.changed(changed)
        for request in q.waiting:
            fresh = replace(request)
            q.waiting.place(fresh, forest.match(q.root, request.tokens).path)
            assert request.device_tokens == fresh.device_tokens
            assert request.host_tokens == fresh.host_tokens
    forest.check_integrity()
