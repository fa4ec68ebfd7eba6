"""Gangs kept incrementally against gangs computed anew from all prompts, over random histories."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.gang import Gangs
from tiered_kv.scheduler.request import QueuedRequest

PROMPTS = st.lists(st.integers(0, 2), max_size=6).map(lambda p: p * 20 if len(p) > 4 else p)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "arrive", "arrive", "lead", "leave", "retract", "expire"]),
        st.integers(0, 30),
        PROMPTS,
        st.integers(0, 1),
    ),
    max_size=60,
)


class Naive:
    """All prompts in a dictionary; every question looks at all of them."""

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[int, list[int]]] = {}
        self.leading: dict[int, tuple[int, list[int], float]] = {}
        self.of_last_pass: set[int] = set()

    def shared(self, a: tuple[int, list[int]], b: tuple[int, list[int]]) -> int:
        if a[0] != b[0]:
            return 0
        n = 0
        while n < min(len(a[1]), len(b[1])) and a[1][n] == b[1][n]:
            n += 1
        return n

    def best_saving(self, request_id: int) -> int:
        own = self.waiting[request_id]
        lengths = [self.shared(own, other) for other in self.waiting.values()]
        return max(
            (sum(length >= end for length in lengths) - 1) * end for end in range(len(own[1]) + 1)
        )

    def computed_by_others(self, request_id: int) -> int:
        own = self.waiting[request_id]
        return max(
            (self.shared(own, (root, tokens)) for root, tokens, _ in self.leading.values()),
            default=0,
        )


class History:
    def __init__(self) -> None:
        forest = Forest(1, tiers=(Tier.DEVICE, Tier.HOST, Tier.DISK))
        self.roots = [forest.root(namespace_hash(name)) for name in ("a", "b")]
        self.gangs, self.naive = Gangs(), Naive()
        self.requests: dict[int, QueuedRequest] = {}
        self.now_s = 0.0

    def step(self, kind: str, at: int, prompt: list[int], tree: int) -> None:
        self.now_s += 1.0
        naive = self.naive
        if kind == "arrive":
            request_id = len(self.requests)
            request = QueuedRequest(
                request_id, self.now_s, self.roots[tree], array("q", prompt), len(prompt) + 1, 8
            )
            self.requests[request_id] = request
            naive.waiting[request_id] = (tree, prompt)
            self.gangs.add(request)
        elif kind == "lead" and naive.waiting:
            request_id = sorted(naive.waiting)[at % len(naive.waiting)]
            until_s = self.now_s + at
            naive.leading[request_id] = (*naive.waiting.pop(request_id), until_s)
            naive.of_last_pass.add(request_id)
            self.gangs.lead(self.requests[request_id], until_s)
        elif kind == "leave" and (known := sorted({*naive.waiting, *naive.leading})):
            request_id = known[at % len(known)]
            naive.waiting.pop(request_id, None)
            naive.leading.pop(request_id, None)
            self.gangs.remove(request_id)
        elif kind == "retract" and naive.leading:
            request_id = sorted(naive.leading)[at % len(naive.leading)]
            root, tokens, _ = naive.leading.pop(request_id)
            naive.waiting[request_id] = (root, tokens)
            self.gangs.add(self.requests[request_id])
        elif kind == "expire":
            for request_id, (_, _, until_s) in list(naive.leading.items()):
                if until_s <= self.now_s and request_id not in naive.of_last_pass:
                    del naive.leading[request_id]
            naive.of_last_pass.clear()
            self.gangs.expire(self.now_s)

    def check(self) -> None:
        gangs, naive = self.gangs, self.naive
        assert len(gangs) == len(naive.waiting)
        for request_id, (tree, prompt) in naive.waiting.items():
            assert gangs.computed_by_others(request_id, ()) == naive.computed_by_others(request_id)
            node = gangs.node_of(request_id)
            most = naive.best_saving(request_id)
            if node is None:
                assert most == 0
                continue
            members = {member.request_id for member in gangs.members(node)}
            together = {
                other
                for other, found in naive.waiting.items()
                if naive.shared((tree, prompt), found) >= node.end
            }
            assert members == together
            assert (len(members) - 1) * node.end == most


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_incremental_gangs_equal_those_computed_anew(
    steps: list[tuple[str, int, list[int], int]],
) -> None:
    history = History()
    for step in steps:
        history.step(*step)
        history.check()
    # Nothing is left behind once all are gone.
    for request_id in history.requests:
        history.gangs.remove(request_id)
    assert len(history.gangs) == 0
    assert history.gangs._trie._roots == {}
