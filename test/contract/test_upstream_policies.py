"""SGLang's newer orders and evictions, as the simulator has them, against SGLang's own code.

Beside 0.5.23: queues are recorded in simulated runs, and each is put before SGLang's policy; trees
go through the same random histories.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support_plugin import on_release
from support_simulation.builders import BLOCK_TOKENS, random_requests, recorded, server
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.memory.leaf_walk import find_victims
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.policies.lpm import LongestPrefixMatch
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.simulation import policies as simulated
from tiered_kv.simulation.cache_policies.sglang_tails import SglangTails
from tiered_kv.simulation.engine import Simulation

pytestmark = pytest.mark.skipif(on_release.IS_0_5_17, reason="0.5.17 has none of them")

ORDERS = {"lpm": "lpm", "sglang-hrrn": "hrrn", "shortest-prefill-first": "shortest-prefill-first"}


def upstream_request(request: Any) -> SimpleNamespace:
    """What SGLang's policy reads of a request; a block of the simulation is as many tokens."""
    own = range(10**9 + 10**6 * request.request_id, 10**12)
    blocks = np.repeat(np.array(request.tokens), BLOCK_TOKENS).tolist()
    tokens = [*blocks, *own[: request.prompt_tokens - len(blocks)]]
    return SimpleNamespace(
        rid=f"{request.request_id:09}",
        origin_input_ids=array("q", tokens[: request.prompt_tokens]),
        output_ids=array("q", own[10**5 : 10**5 + request.output_tokens]),
        extra_key=None,
        cache_salt=None,
        device_tokens=request.device_tokens,
        num_matched_prefix_tokens=request.cached_tokens,
        arrival_processed_tokens=request.processed_at_arrival,
        time_stats=SimpleNamespace(wait_queue_entry_time=request.queued_s),
    )


def upstream_begun(request: Any) -> SimpleNamespace:
    n_tokens = request.prompt_tokens + request.output_tokens
    return SimpleNamespace(
        full_untruncated_fill_ids=range(n_tokens), prefix_len=request.prefilled_tokens
    )


class Upstream:
    """SGLang's policy; what it would look up in the cache was recorded."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.managers import schedule_policy

        def match(req: Any, tree_cache: Any, token_ids: Any = None) -> None:
            req.prefix_len = req.device_tokens

        monkeypatch.setattr(schedule_policy, "match_kv_cache", match)
        monkeypatch.setattr(
            schedule_policy, "get_disagg", lambda: SimpleNamespace(disaggregation_mode="null")
        )
        monkeypatch.setenv("SGLANG_ENABLE_WAITING_PREFIX_REFRESH", "0")  # asks for a whole server
        cache = SimpleNamespace(disable=False, supports_fast_match_prefix=lambda: True)
        self.policy = schedule_policy.SchedulePolicy(name, cache, False, False, False)

    def decide(self, before: list[Any], state: SchedulerState) -> tuple[list[int], int | None]:
        """The queue as it sorts it, and what it gives of the chunk to the prompt that was begun."""
        queue = [upstream_request(request) for request in before]
        self.policy.calc_priority(queue, None, state.processed_prefill_tokens)
        chunk = None
        if state.unfinished is not None:
            begun = upstream_begun(state.unfinished)
            chunk = self.policy.shortest_prefill_chunk_limit(
                begun, queue, state.chunk_tokens, state.page_tokens
            )
        return [int(req.rid) for req in queue], chunk


@pytest.mark.parametrize("name", ORDERS)
def test_orders_decide_as_sglang_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = Upstream(ORDERS[name], monkeypatch)
    seen = {"plans": 0, "chunks": 0, "longest": 0, "moved": 0}
    stock: type[LongestPrefixMatch] = simulated.request_order(name)  # type: ignore[assignment]

    class Checked(stock):  # type: ignore[misc, valid-type]
        def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
            before = self.queued(state)
            order, chunk = upstream.decide(before, state)
            plan: AdmissionPlan = super().plan(state, limit)
            assert [request.request_id for request in self.queued(state)] == order
            assert plan.unfinished_at_most == chunk
            assert plan.order == tuple(i for i in order if i not in state.held)[:limit]
            seen["plans"] += 1
            seen["chunks"] += chunk is not None
            seen["longest"] = max(seen["longest"], len(order))
            seen["moved"] += order != [request.request_id for request in before]
            return plan

    monkeypatch.setattr(simulated, "request_order", lambda _: Checked)
    requests = random_requests(5, 260, rate=60.0)
    settings = server(
        device_blocks=260, host_blocks=150, chunk_tokens=1024, max_prefill_tokens=2048, policy=name
    )
    result = Simulation(recorded(requests), settings).run()
    assert len(result.records) == len(requests)
    assert seen["plans"] > 200
    assert seen["moved"] > 20
    assert seen["longest"] > 128, "nobody saw a queue that some orders leave as it is"
    assert bool(seen["chunks"]) == (name == "shortest-prefill-first")


# -- eviction ----------------------------------------------------------------------------------

PAGE = 4
BUDGET, NEXT_PROMPT = 48, 16


class OurTree:
    def __init__(self) -> None:
        self.forest = Forest(PAGE)
        self.root = self.forest.root(namespace_hash("m"))
        self.order = SglangTails(self.forest, Tier.DEVICE, NEXT_PROMPT, BUDGET)

    def insert(self, tokens: array[int]) -> None:
        with self.rest_renewed():
            self.forest.insert(self.root, tokens, range(len(tokens)))

    def matched(self, tokens: array[int]) -> int:
        with self.rest_renewed():
            return self.forest.match(self.root, tokens).n_tokens

    @contextmanager
    def rest_renewed(self) -> Iterator[None]:
        """SGLang takes all of a node that it splits for used; ours what was asked for."""
        starts = {node: node.start for node in self.forest.nodes()}
        yield
        for node, start in starts.items():
            if node.start != start:  # the lower part
                assert node.parent is not None
                node.last_access = node.parent.last_access

    def evict(self, n_tokens: int) -> int:
        victims = find_victims(self.forest, Tier.DEVICE, self.order, -(-n_tokens // PAGE))
        for node in victims:
            self.forest.evict(node, Tier.DEVICE)
        return sum(node.n_tokens for node in victims)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("core", ["python", "rust"])
def test_tails_go_as_in_sglang(core: str, seed: int) -> None:
    import torch

    from benchmark.micro.unified_tree import UnifiedTree

    config = {"threshold": BUDGET, "next_prompt_estimate": NEXT_PROMPT}
    theirs = UnifiedTree(core, PAGE, eviction_policy="tlru", eviction_policy_config=config)
    ours = OurTree()
    random = np.random.default_rng(seed)
    conversations: list[array[int]] = [array("q")]
    n_evictions = 0
    for _ in range(300):
        choice = random.integers(4)
        tokens = conversations[random.integers(len(conversations))]
        if choice == 0:  # another turn, or a branch of an earlier one
            kept = PAGE * int(random.integers(0, len(tokens) // PAGE + 1))
            new = random.integers(1, 10**6, PAGE * int(random.integers(1, 12)))
            conversations.append(array("q", [*tokens[:kept], *new]))
            ours.insert(conversations[-1])
            theirs.insert(conversations[-1], torch.arange(len(conversations[-1])))
        elif choice == 1 and len(tokens):
            assert ours.matched(tokens) == theirs.match(tokens).device_prefix_len
        elif choice == 2 and len(conversations) > 8:
            n_tokens = PAGE * int(random.integers(1, 10))
            assert ours.evict(n_tokens) == theirs.evict(n_tokens)
            n_evictions += 1
    assert n_evictions > 30
