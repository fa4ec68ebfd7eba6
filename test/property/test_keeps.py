"""Keeps against a naive model: what is kept, for whom, until when, and never more than the bounds.

And the order of eviction with keeps: what is kept goes only when nothing else is left.
"""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.memory.eviction import Eviction, eviction_policies
from tiered_kv.memory.keeps import KeepBounds, Keeps

BOUNDS = KeepBounds(all_pages=8, tenant_pages=5)
TIERS = (Tier.HOST, Tier.DISK)
NAMES = [bytes([n]) * 32 for n in range(12)]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["grant", "grant", "grant", "release", "release for all", "later"]),
        st.sampled_from(TIERS),
        st.sampled_from(["", "a", "b"]),
        st.lists(st.sampled_from(NAMES), max_size=8),
        st.integers(0, 20),
    ),
    max_size=40,
)


class Naive:
    """A list of who keeps which page until when."""

    def __init__(self) -> None:
        self.rows: dict[tuple[Tier, str, bytes], float] = {}

    def grant(self, tier: Tier, tenant: str, names: list[bytes], until_s: float) -> int:
        for n, name in enumerate(names):
            if (tier, tenant, name) not in self.rows:
                own = sum(key[:2] == (tier, tenant) for key in self.rows)
                known = {key[2] for key in self.rows if key[0] is tier}
                is_full = name not in known and len(known) >= BOUNDS.all_pages
                if own >= BOUNDS.tenant_pages or is_full:
                    return n
            self.rows[tier, tenant, name] = until_s
        return len(names)

    def until_s(self, tier: Tier, name: bytes) -> float | None:
        ends = [end for key, end in self.rows.items() if key[0] is tier and key[2] == name]
        return max(ends, default=None)


@settings(max_examples=300)
@given(STEPS)
def test_keeps_are_what_a_list_of_them_would_be(
    steps: list[tuple[str, Tier, str, list[bytes], int]],
) -> None:
    keeps, naive, now_s = Keeps(), Naive(), 0.0
    for kind, tier, tenant, names, number in steps:
        if kind == "grant":
            until_s = now_s + 1 + number
            granted = keeps.grant(tier, tenant, names, until_s, BOUNDS)
            assert granted == naive.grant(tier, tenant, names, until_s)
        elif kind == "later":
            now_s += number
            for _ in range(len(steps) + 1):  # a part at a time
                keeps.end(now_s)
            naive.rows = {key: end for key, end in naive.rows.items() if end > now_s}
        else:
            of = tenant if kind == "release" else None
            keys = [k for k in naive.rows if k[0] is tier and k[2] in names and of in (None, k[1])]
            assert keeps.release(tier, names, of) == len({key[2] for key in keys})
            for key in keys:
                del naive.rows[key]
        for one in TIERS:
            assert [keeps.until_s(one, n) for n in NAMES] == [naive.until_s(one, n) for n in NAMES]
            assert keeps.n_pages(one) == len({key[2] for key in naive.rows if key[0] is one})
            assert keeps.n_pages(one) == len(set(keeps.pages(one))) <= BOUNDS.all_pages
            for name in ("", "a", "b"):
                own = sum(key[:2] == (one, name) for key in naive.rows)
                assert keeps.tenants(one).get(name, 0) == own <= BOUNDS.tenant_pages
    keeps_left = bool(keeps)
    for _ in range(len(steps) + 1):
        keeps.end(1e9)
    assert not keeps
    assert not keeps_left or not any(keeps.n_pages(tier) for tier in TIERS)


@settings(max_examples=200)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8),
    kept=st.sets(st.integers(0, 7), max_size=4),
    wanted=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
def test_what_is_kept_goes_last(
    prompts: list[list[int]], kept: set[int], wanted: list[int]
) -> None:
    forest, keeps = Forest(1), Keeps()
    root = forest.root(namespace_hash("model"))
    eviction = Eviction(forest, eviction_policies.get("lru"), keeps=keeps)
    no_bounds = KeepBounds(1000, 1000)
    for pages in prompts:
        forest.insert(root, array("q", pages), range(len(pages)))
        node = forest.peek(root, array("q", pages)).path[-1]
        forest.insert(root, array("q", pages), range(len(pages)), tier=Tier.HOST)
        assert node in forest
    nodes = forest.nodes()
    for n in kept & set(range(len(nodes))):
        at = nodes[n]
        while not at.is_root:
            keeps.grant(Tier.HOST, "", at.page_hashes, 10.0 + n, no_bounds)
            assert at.parent is not None
            at = at.parent
    for n_pages in wanted:
        victims = eviction.victims(Tier.HOST, n_pages)
        resident = forest.resident_tokens(Tier.HOST)
        assert sum(node.n_pages for node in victims) >= min(n_pages, resident)
        free = [
            node
            for node in forest.nodes()
            if keeps.until_s(Tier.HOST, node.last_page_hash) is None and node.slots(Tier.HOST)
        ]
        are_kept = [keeps.until_s(Tier.HOST, v.last_page_hash) is not None for v in victims]
        if any(are_kept):
            assert set(free) <= set(victims), "something else was left"
            assert are_kept == sorted(are_kept)
        for node in victims:
            forest.evict(node, Tier.HOST)
    keeps.end(100.0)
    for _ in range(50):
        keeps.end(100.0)
    rest = forest.resident_tokens(Tier.HOST)
    assert sum(node.n_pages for node in eviction.victims(Tier.HOST, 10**6)) == rest
