"""Whatever the policies: every request is answered once, tokens add up, no pool overflows.

The pools are so small that the random workloads evict, retract and wait. `watched` looks into the
server after every event.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support_simulation.builders import BLOCK_TOKENS, call, random_requests, recorded, server
from support_simulation.conservation import assert_conserved, watched
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.policies import SIMULATED_ORDERS
from tiered_kv.simulation.settings import DiskSpec

POLICIES = (
    *("fcfs", "lpm", "dfs-weight", "priority", "hrrn", "k-lpm", "edf", "niyama", "slack"),
    *("sliding-serve", "plas", "atlas", "program-fcfs", "pausing"),
    *SIMULATED_ORDERS,
)
CACHES = {
    "device": {},
    "host": {"host_blocks": 150},
    "disk": {"host_blocks": 150, "disk_blocks": 400},
    "slow disk": {"host_blocks": 150, "disk_blocks": 400, "disk": DiskSpec(read_bandwidth=2e8)},
    "best effort": {"host_blocks": 150, "disk_blocks": 400, "stop_policy": "best_effort"},
    "timeout": {"host_blocks": 150, "disk_blocks": 400, "stop_policy": "timeout"},
    "cost": {
        "host_blocks": 150,
        "disk_blocks": 400,
        "disk": DiskSpec(read_bandwidth=2e8),
        "load_policy": "cost",
        "stop_policy": "patience",
    },
    "tlru": {"host_blocks": 150, "eviction": "tlru"},
    "sglang-tlru": {"host_blocks": 150, "eviction": "sglang-tlru"},
    "hints": {"host_blocks": 150, "hints": True},
    "belady": {"host_blocks": 150, "eviction": "belady"},
    "kvflow": {"host_blocks": 150, "eviction": "kvflow"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_under_every_order(policy: str) -> None:
    requests = random_requests(3, 150)
    settings = server(device_blocks=260, host_blocks=150, disk_blocks=400, policy=policy)
    result, simulation = watched(recorded(requests), settings)
    assert_conserved(result, simulation, 150)


@pytest.mark.parametrize("cache", CACHES)
def test_with_every_cache(cache: str) -> None:
    requests = random_requests(4, 150)
    result, simulation = watched(
        recorded(requests), server(device_blocks=260, policy="lpm", **CACHES[cache])
    )
    assert_conserved(result, simulation, 150)


@pytest.mark.parametrize("mixed", [False, True])
def test_when_decoding_runs_out_of_memory(mixed: bool) -> None:
    # Limits far below what is really produced: admission promises too much.
    requests = [
        replace(request, output_tokens=600 + 10 * (request.request_id % 40))
        for request in random_requests(5, 80, rate=200.0)
    ]
    settings = server(
        device_blocks=200,
        max_new_tokens=1,
        init_new_token_ratio=0.01,
        mixed_chunk=mixed,
    )
    result, simulation = watched(recorded(requests), settings)
    assert result.n_retractions > 0
    assert sum(record.n_retractions for record in result.records) == result.n_retractions
    assert_conserved(result, simulation, 80)


def test_what_can_never_fit_is_refused_at_once() -> None:
    requests = [call(0, 0.0, range(1, 20)), call(1, 1.0, range(100, 300)), call(2, 2.0, [5])]
    result, simulation = watched(recorded(requests), server(device_blocks=100))
    finished = {record.request_id: record.finish_s for record in result.records}
    assert finished[1] is None
    assert finished[0] is not None
    assert finished[2] is not None
    assert simulation.instances[0].cache.private_tokens == 0


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    settings = server(device_blocks=260, host_blocks=150, disk_blocks=400, noise=0.1)

    def run(seed: int) -> list[object]:
        return Simulation(recorded(random_requests(6, 80)), settings, seed=seed).run().records

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_instances_share_the_work_of_a_router() -> None:
    requests = random_requests(7, 100)
    simulation = Simulation(
        recorded(requests),
        server(device_blocks=300),
        n_instances=2,
        router=lambda request, instances: request.request_id % len(instances),
    )
    result = simulation.run()
    assert sorted(record.request_id for record in result.records) == list(range(100))
    assert all(instance.processed_prefill_tokens > 0 for instance in simulation.instances)
    alone = Simulation(recorded(requests[::2]), server(device_blocks=300)).run()
    first = [record for record in result.records if record.request_id % 2 == 0]
    assert np.allclose(
        [record.finish_s for record in first], [record.finish_s for record in alone.records]
    )


def test_blocks_of_an_answer_are_found_by_the_next_call() -> None:
    first = call(0, 0.0, range(1, 5), output_tokens=3 * BLOCK_TOKENS, extra_tokens=10)
    first.output_blocks.extend([50, 51])
    prompt = [1, 2, 3, 4, 50, 51, 60]
    result, _ = watched(recorded([first, call(1, 100.0, prompt)]), server())
    # 4 * 64 + 10 prompt tokens and 191 outputs with KV fill 7 blocks; ids are known for 6 of them.
    assert result.records[1].device_hit_tokens == 6 * BLOCK_TOKENS
