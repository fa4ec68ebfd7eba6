"""Eviction on small workloads, played on one tier, hits counted."""

from __future__ import annotations

import random

import pytest

from support_memory.one_tier import OneTier, play
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import namespace_hash
from tiered_kv.memory.eviction import eviction_policies

ALL = eviction_policies.names()


def names(family: int, n: int) -> list[int]:
    return [family * 100_000 + i for i in range(n)]


def shared_prefixes_and_scans(rng: random.Random, n: int) -> list[list[int]]:
    """Ten agents' instructions of 40 pages, asked for over and over, and prompts seen only once."""
    prompts = []
    for i in range(n):
        if rng.random() < 0.4:
            prompts.append([*names(rng.randrange(10), 40), *names(1000 + i, 5)])
        else:
            prompts.append(names(1000 + i, 60))
    return prompts


def test_a_queue_that_is_known_keeps_what_it_needs_from_scans() -> None:
    """Recency alone loses shared instructions to prompts that are seen only once."""
    prompts = shared_prefixes_and_scans(random.Random(1), 1500)
    alone = play("lru", 600, prompts)
    tier = OneTier("lru", 600)
    for at, prompt in enumerate(prompts):
        tier.expect(prompts[at + 1 : at + 9])
        tier.ask(prompt)
    assert tier.outcome.hit_share > 1.15 * alone.hit_share


@pytest.mark.parametrize("policy", ALL)
def test_a_tier_large_enough_loses_nothing(policy: str) -> None:
    prompts = [names(family, 20) for family in (1, 2, 3, 1, 2, 3, 1, 2, 3)]
    assert play(policy, 60, prompts).hits == 6 * 20


@pytest.mark.parametrize("policy", ALL)
def test_forgotten_nodes_leave_nothing_behind(policy: str) -> None:
    tier = OneTier(policy, 200)
    for family in range(3000):
        tier.ask(names(family, 20))
    assert len(tier.forest) <= 10
    assert _size_of(tier.policy, set()) < 30_000


def _size_of(thing: object, seen: set[int]) -> int:
    """How many objects hang on `thing`, the forest left out."""
    if id(thing) in seen or type(thing).__module__.startswith("tiered_kv.forest"):
        return 0
    seen.add(id(thing))
    parts: list[object] = []
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, list | tuple | set):
        parts = list(thing)
    elif hasattr(thing, "__dict__"):
        parts = list(vars(thing).values())
    return 1 + sum(_size_of(part, seen) for part in parts)


def test_an_eviction_policy_may_serve_several_trees() -> None:
    tier = OneTier("lru", 100)
    tier.ask(names(1, 10))
    tier.root = tier.forest.root(namespace_hash("other"))
    tier.ask(names(1, 10))
    assert len(tier.policy.victims(Tier.DEVICE, 20)) == 2
