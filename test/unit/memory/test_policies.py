"""What each policy is good for: small workloads played on one tier, hits counted."""

from __future__ import annotations

import random

import pytest

from support_memory.one_tier import OneTier, play
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost, PlacementCosts

ALL = ["lru", "slru", "s3fifo", "value"]


@pytest.fixture
def costs() -> PlacementCosts:
    edges = {
        (Tier.HOST, Tier.DEVICE): EdgeCost(50e9, 1e-5),
        (Tier.DISK, Tier.HOST): EdgeCost(4e9, 1e-4),
    }
    model = CostModel(find_model("Llama-3.1-8B"), find_device("H100-80"), edges)
    return PlacementCosts(model, tokens_per_unit=64)


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


def conversations(rng: random.Random, n: int) -> list[list[int]]:
    """Conversations that grow by 6 pages a turn, 15 at a time; a finished one makes room."""
    prompts: list[list[int]] = []
    open_ones: list[list[int]] = []
    for i in range(n):
        if len(open_ones) < 15:
            open_ones.append(names(i, 10))
        history = open_ones[rng.randrange(len(open_ones))]
        history += [1_000_000_000 + i * 10 + j for j in range(6)]
        prompts.append(list(history))
        if rng.random() < 0.1:
            open_ones.remove(history)
    return prompts


@pytest.mark.parametrize("policy", ["slru", "s3fifo", "value"])
def test_scans_do_not_push_out_what_is_shared(policy: str, costs: PlacementCosts) -> None:
    prompts = shared_prefixes_and_scans(random.Random(1), 1500)
    lru = play("lru", 600, prompts, costs)
    other = play(policy, 600, prompts, costs)
    assert other.hit_share > 1.15 * lru.hit_share
    assert other.computed_s < lru.computed_s


@pytest.mark.parametrize("n_pages", [200, 400, 800])
def test_value_is_not_much_worse_than_lru_where_recency_is_all(
    n_pages: int, costs: PlacementCosts
) -> None:
    prompts = conversations(random.Random(2), 1500)
    lru, value = play("lru", n_pages, prompts, costs), play("value", n_pages, prompts, costs)
    assert value.computed_s < 1.05 * lru.computed_s


@pytest.mark.parametrize("policy", ALL)
def test_a_tier_large_enough_loses_nothing(policy: str) -> None:
    prompts = [names(family, 20) for family in (1, 2, 3, 1, 2, 3, 1, 2, 3)]
    assert play(policy, 60, prompts).hits == 6 * 20


def test_a_leaf_that_can_be_loaded_goes_before_one_that_must_be_computed(
    costs: PlacementCosts,
) -> None:
    tier = OneTier("value", 100, costs)
    for family in (1, 2, 3):
        tier.ask(names(family, 10))
    newest = tier.forest.nodes()[-1]
    tier.forest.set_resident(newest, Tier.HOST, range(10))
    (victim,) = tier.policy.victims(Tier.DEVICE, 10)
    assert victim is newest
    assert tier.policy.victims(Tier.HOST, 10) == [newest]


def test_of_two_prompts_as_old_the_shallow_one_goes_first(costs: PlacementCosts) -> None:
    """A deep page attends to more, so it costs more to compute again."""
    forest_holder = OneTier("value", 2000, costs)
    forest_holder.ask(names(1, 1000))
    forest_holder.ask([*names(1, 1000), *names(3, 10)])
    forest_holder.ask(names(2, 10))
    deep, shallow = forest_holder.forest.nodes()[-2:]
    assert forest_holder.policy.victims(Tier.DEVICE, 10) == [shallow]
    assert deep.end > shallow.end


def test_what_the_forecast_names_stays_until_the_forecast_drops_it(costs: PlacementCosts) -> None:
    tier = OneTier("value", 100, costs)
    policy = tier.policy
    for family in (1, 2, 3):
        tier.ask(names(family, 10))
    oldest, second, _ = tier.forest.nodes()
    assert policy.victims(Tier.DEVICE, 1) == [oldest]
    policy.on_forecast(DemandForecast({oldest.node_id: Expectation(starts_in_s=1.0)}))
    assert policy.victims(Tier.DEVICE, 1) == [second]
    assert oldest in policy.victims(Tier.DEVICE, 30), "it is a wish, not a pin"
    policy.on_forecast(DemandForecast())
    for family in range(4, 60):
        tier.ask(names(family, 10))
    assert oldest.state(Tier.DEVICE) is Residency.ABSENT


def test_the_parents_of_what_is_expected_stay_too(costs: PlacementCosts) -> None:
    """The expected node itself may be farther away: its parents must be here when it comes."""
    tier = OneTier("value", 100, costs)
    policy = tier.policy
    tier.ask(names(1, 10))
    tier.ask(names(1, 10) + names(2, 5))
    tier.ask(names(3, 10))
    parent, child, other = tier.forest.nodes()
    tier.forest.set_resident(child, Tier.HOST, range(5))
    tier.forest.evict(child, Tier.DEVICE)
    assert policy.victims(Tier.DEVICE, 1) == [parent]
    policy.on_forecast(DemandForecast({child.node_id: Expectation(starts_in_s=0.0)}))
    assert policy.victims(Tier.DEVICE, 1) == [other]


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
    tier = OneTier("value", 100)
    tier.ask(names(1, 10))
    tier.root = tier.forest.root(namespace_hash("other"))
    tier.ask(names(1, 10))
    assert len(tier.policy.victims(Tier.DEVICE, 20)) == 2
