"""The decisions of one simulated server: the policies by their names, and what they believe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tiered_kv.core.config import STORE_WRITES, MemoryConfig
from tiered_kv.memory.eviction import OrderFactory
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.scheduler.cost_model import PlacementCosts
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.request_policy import RequestPolicy, request_policies
from tiered_kv.simulation.belief import Believed
from tiered_kv.simulation.cache import ManagerFactory
from tiered_kv.simulation.cache_policies.belady import Clairvoyance
from tiered_kv.simulation.cache_policies.farthest_use import (
    Foresight,
    ForesightManager,
    Listener,
)
from tiered_kv.simulation.cache_policies.hints import HintedManager, Hints
from tiered_kv.simulation.cache_policies.kvflow import WorkflowKnowledge
from tiered_kv.simulation.cache_policies.sglang_tails import BUDGET_TOKENS, SglangTails
from tiered_kv.simulation.cache_policies.tail_optimized import NEXT_PROMPT_TOKENS, TailsFirst
from tiered_kv.simulation.cache_policies.whole_leaves import WholeLeafManager
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.upstream_orders import HighestResponseRatio, ShortestPrefillFirst
from tiered_kv.simulation.workload.request import Workload

SIMULATED = ("belady", "kvflow", "tlru", "sglang-tlru")
"""Policies of eviction that only the simulator has."""
SIMULATED_ORDERS: Mapping[str, Callable[[], RequestPolicy]] = {
    "sglang-hrrn": HighestResponseRatio,
    "shortest-prefill-first": ShortestPrefillFirst,
}
"""Orders of waiting requests that only the simulator has."""


@dataclass(frozen=True, slots=True)
class Policies:
    """Of one instance; policies keep state, so each instance has its own."""

    request: RequestPolicy
    believed: Believed
    make_manager: ManagerFactory
    listener: Listener | None = None


def make_policies(workload: Workload, settings: InstanceSettings) -> Policies:
    """New ones. Raises ConfigError for a name that is not known."""
    believed = Believed(settings)
    return Policies(_request_policy(settings), believed, *_memory(workload, settings, believed))


def request_order(name: str) -> Callable[[], RequestPolicy]:
    """The server's or the simulator's own. Raises ConfigError for a name that is not known."""
    return SIMULATED_ORDERS.get(name) or request_policies.get(name)


def _request_policy(settings: InstanceSettings) -> RequestPolicy:
    """By name; the one that has options gets them."""
    make = request_order(settings.policy)
    return SlackPolicy(settings.slack) if make is SlackPolicy else make()


def _memory(
    workload: Workload, settings: InstanceSettings, believed: Believed
) -> tuple[ManagerFactory, Listener | None]:
    """The memory manager of an instance: the server's, or around a policy that it lacks."""
    cache = settings.cache
    costs = PlacementCosts(believed.costs, workload.block_tokens)
    name = cache.eviction
    config = MemoryConfig(
        eviction_policy="lru" if name in SIMULATED else name,
        protect_expected=cache.protect_expected,
        host_enabled=bool(cache.host_bytes),
        disk_enabled=bool(cache.disk_bytes),
        load_policy=cache.load_policy,
        store_writes=STORE_WRITES[0] if cache.shared is None else cache.shared.writes,
    )
    if name in {"belady", "kvflow"}:
        foresight: Foresight = Clairvoyance(workload) if name == "belady" else WorkflowKnowledge()
        return lambda forest: ForesightManager(forest, config, foresight, costs), foresight
    make_order: OrderFactory | None = None
    next_prompt = -(-NEXT_PROMPT_TOKENS // workload.block_tokens)
    if name == "tlru":
        make_order = partial(TailsFirst, costs=costs, next_prompt=next_prompt)
    elif name == "sglang-tlru":
        budget = BUDGET_TOKENS // workload.block_tokens
        make_order = partial(SglangTails, next_prompt=next_prompt, budget=budget)
    if cache.hints or cache.learn_pauses:
        hints = Hints(are_said=cache.hints, are_learned=cache.learn_pauses)
        make = partial(HintedManager, hints=hints, make_order=make_order)
        return lambda forest: make(forest, config, costs), hints
    if cache.whole_leaves or name == "sglang-tlru":
        return lambda forest: WholeLeafManager(forest, config, costs, make_order=make_order), None
    return lambda forest: MemoryManager(forest, config, costs, make_order=make_order), None
