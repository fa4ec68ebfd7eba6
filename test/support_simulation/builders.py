"""Small workloads, servers and queues."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tiered_kv.api.slo import NO_SLO, Slo
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost
from tiered_kv.scheduler.measured_costs import PassTimes
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.prefill_turns import PrefillTurns
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving, RequestPolicy, SchedulerState
from tiered_kv.scheduler.waiting import WaitingQueue
from tiered_kv.simulation.engine import Simulation, SimulationResult
from tiered_kv.simulation.settings import CacheSettings, InstanceSettings
from tiered_kv.simulation.workload.request import RecordedWorkload, Request, Workload

BLOCK_TOKENS = 64
MODEL = find_model("Llama-3.1-8B")
DEVICE = find_device("H200-141")
BLOCK_BYTES = int(MODEL.kv_bytes_per_token * BLOCK_TOKENS)

#: Passes of a machine much like two cores with a small model.
CPU_TIMES = PassTimes(
    prefill_fixed_s=0.08,
    prefill_request_s=0.02,
    prefill_token_s=0.0033,
    prefill_pair_s=4e-7,
    prefill_cached_s=2e-5,
    decode_fixed_s=0.045,
    decode_request_s=0.012,
    decode_context_s=1.2e-5,
)


def call(
    request_id: int,
    arrival_s: float,
    blocks: Sequence[int],
    output_tokens: int = 8,
    extra_tokens: int = 1,
    **more: Any,
) -> Request:
    """A request over whole `blocks` and `extra_tokens` more."""
    return Request(
        request_id=request_id,
        arrival_s=arrival_s,
        blocks=array("q", blocks),
        input_tokens=len(blocks) * BLOCK_TOKENS + extra_tokens,
        output_tokens=output_tokens,
        session=more.pop("session", None),
        slo_class=more.pop("slo_class", "standard"),
        ttft_slo_s=more.pop("ttft_slo_s", None),
        tbt_slo_s=more.pop("tbt_slo_s", None),
        **more,
    )


def server(
    *, device_blocks: int = 1000, host_blocks: int = 0, disk_blocks: int = 0, **more: Any
) -> InstanceSettings:
    """An H200 with an 8B model and pools of so many blocks."""
    cache = {
        name: more.pop(name)
        for name in (
            "eviction",
            "protect_expected",
            "hints",
            "whole_leaves",
            "stop_policy",
            "load_policy",
            "disk",
        )
        if name in more
    }
    return InstanceSettings(
        model=MODEL,
        device=DEVICE,
        cache=CacheSettings(
            device_bytes=device_blocks * BLOCK_BYTES,
            host_bytes=host_blocks * BLOCK_BYTES,
            disk_bytes=disk_blocks * BLOCK_BYTES,
            **cache,
        ),
        **more,
    )


def recorded(requests: Iterable[Request]) -> RecordedWorkload:
    return RecordedWorkload("test", BLOCK_TOKENS, requests)


def simulate(
    workload: Workload | Iterable[Request], settings: InstanceSettings, **more: Any
) -> tuple[SimulationResult, Simulation]:
    """The result, and the simulation to look into."""
    if not hasattr(workload, "follow_up"):
        workload = recorded(workload)
    simulation = Simulation(workload, settings, **more)
    return simulation.run(), simulation


def random_requests(seed: int, n: int, *, rate: float = 20.0, documents: int = 12) -> list[Request]:
    """Prompts that share leading blocks of a few documents, at random times."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1.0 / rate, n))
    requests = []
    for index in range(n):
        document = int(random.integers(documents))
        shared = [1000 * (document + 1) + at for at in range(int(random.integers(0, 40)))]
        own = [10**6 + 100 * index + at for at in range(int(random.integers(0, 30)))]
        requests.append(
            call(
                index,
                float(arrivals[index]),
                shared + own,
                output_tokens=int(random.integers(1, 300)),
                extra_tokens=int(random.integers(1, BLOCK_TOKENS)),
                slo_class=("interactive", "batch")[index % 2],
                ttft_slo_s=(0.5, 30.0)[index % 2],
                tbt_slo_s=(0.05, None)[index % 2],
                priority=index % 3,
            )
        )
    return requests


class Queue:
    """A waiting queue over a forest, and a policy's view of it."""

    def __init__(self, policy: RequestPolicy) -> None:
        self.policy = policy
        self.forest = Forest(1, tiers=(Tier.DEVICE, Tier.HOST, Tier.DISK))
        self.root = self.forest.root(namespace_hash("test"))
        self.waiting = WaitingQueue(self.forest, tokens_per_unit=BLOCK_TOKENS)
        self.now_s = 0.0
        self.processed = 0
        self.running: list[QueuedRequest] = []
        self.held: dict[int, Arriving] = {}
        self.turns = PrefillTurns()
        self.available_tokens: int | None = None

    def cache(self, blocks: Sequence[int], tier: Tier = Tier.DEVICE) -> None:
        tokens = array("q", blocks)
        self.forest.insert(self.root, tokens, range(len(tokens)), tier=tier)

    def arrive(
        self,
        request_id: int,
        blocks: Sequence[int],
        *,
        slo: Slo = NO_SLO,
        priority: int = 0,
        tokens: int | None = None,
        program: str = "",
        parent_program: str = "",
        branches: int = 1,
    ) -> QueuedRequest:
        request = QueuedRequest(
            request_id=request_id,
            arrival_s=self.now_s,
            root=self.root,
            tokens=array("q", blocks),
            prompt_tokens=len(blocks) * BLOCK_TOKENS + 1 if tokens is None else tokens,
            max_new_tokens=100,
            slo=slo,
            priority=priority,
            program=program,
            parent_program=parent_program,
            branches=branches,
            queued_s=self.now_s,
            processed_at_arrival=self.processed,
        )
        self.waiting.add(request)
        self.policy.on_arrival(request, self.now_s)
        return request

    def admit(self, request_id: int) -> None:
        request = self.waiting.get(request_id)
        self.waiting.remove(request)
        self.policy.on_admission(request, self.now_s)

    def hold(self, *request_ids: int, ready_s: float = 0.0, tokens: int = 0) -> None:
        """Their pages are on the way."""
        self.held.update(dict.fromkeys(request_ids, Arriving(ready_s, tokens)))

    def state(self) -> SchedulerState:
        return SchedulerState(
            now_s=self.now_s,
            waiting=self.waiting,
            held=self.held,
            running=self.running,
            decode_context_tokens=sum(r.prompt_tokens + r.output_tokens for r in self.running),
            processed_prefill_tokens=self.processed,
            chunk_tokens=8192,
            costs=cost_model(),
            available_tokens=self.available_tokens,
            turns=self.turns,
        )

    def plan(self, limit: int = 1000) -> AdmissionPlan:
        """As it is carried out if everyone who runs decodes."""
        return self.policy.plan(self.state(), limit).within()

    def order(self, limit: int = 1000) -> list[int]:
        return list(self.plan(limit).order)


def cost_model() -> CostModel:
    edge = EdgeCost(50e9, 1e-5)
    return CostModel(
        MODEL, DEVICE, {(Tier.HOST, Tier.DEVICE): edge, (Tier.DEVICE, Tier.HOST): edge}
    )
