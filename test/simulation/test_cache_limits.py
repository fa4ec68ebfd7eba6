"""What any eviction policy can reach at most: Belady below, an infinite cache above."""

from __future__ import annotations

import numpy as np
import pytest

from support_simulation.builders import (
    BLOCK_TOKENS,
    call,
    random_requests,
    recorded,
    server,
    simulate,
)
from tiered_kv.core.errors import ConfigError
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.settings import DiskSpec, InstanceSettings
from tiered_kv.simulation.statistics import hit_tokens
from tiered_kv.simulation.workload.generators.agents import Agents
from tiered_kv.simulation.workload.request import RecordedWorkload, Workload


def found(workload: Workload, settings: InstanceSettings) -> int:
    """Prompt tokens found in any tier."""
    hits = hit_tokens(Simulation(workload, settings).run().records)
    return hits["input"] - hits["computed"]


def zipf_documents(seed: int, n: int = 400) -> RecordedWorkload:
    """Documents by popularity, one at a time, so that arrivals decide the order of uses."""
    random = np.random.default_rng(seed)
    requests = []
    for index in range(n):
        document = int(min(random.zipf(1.3), 60))
        length = int(random.integers(5, 25))
        blocks = [1000 * document + at for at in range(length)] + [10**6 + index]
        requests.append(call(index, 5.0 * index, blocks, output_tokens=2))
    return recorded(requests)


def unlimited(workload: RecordedWorkload) -> int:
    """Tokens found if nothing were ever forgotten, counted without the simulator."""
    known: set[tuple[int, ...]] = set()
    total = 0
    for request in workload.initial():
        blocks = tuple(request.blocks)
        hit = 0
        while hit < len(blocks) and blocks[: hit + 1] in known:
            hit += 1
        total += min(hit * BLOCK_TOKENS, request.input_tokens - 1)
        known.update(blocks[: end + 1] for end in range(len(blocks)))
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tiers", [{}, {"host_blocks": 60}])
def test_belady_finds_most_and_an_infinite_cache_all(seed: int, tiers: dict[str, int]) -> None:
    workload = zipf_documents(seed)
    by_policy = {
        eviction: found(workload, server(device_blocks=80, eviction=eviction, **tiers))
        for eviction in ("lru", "tlru", "belady", "kvflow")
    }
    best = unlimited(workload)
    assert by_policy["belady"] == max(by_policy.values())
    assert by_policy["belady"] > by_policy["lru"]
    assert by_policy["belady"] < best
    assert found(workload, server(device_blocks=20_000)) == best
    assert found(workload, server(device_blocks=80, host_blocks=20_000)) == best


def test_without_hints_kvflow_is_lru() -> None:
    workload = zipf_documents(9)
    lru, kvflow = (
        found(workload, server(device_blocks=80, eviction=eviction))
        for eviction in ("lru", "kvflow")
    )
    assert lru == kvflow


@pytest.mark.parametrize("policy", ["fcfs", "hrrn", "slack"])
def test_a_long_queue_finds_what_left_the_host_while_it_waited(policy: str) -> None:
    """Whoever comes while its prefix is still to be computed finds no store that has it. By its
    turn, device and host have given it up, and the disk has it."""
    documents = [[1000 * (n + 1) + at for at in range(40)] for n in range(30)]
    requests = [call(n, 0.001 * n, blocks, 2) for n, blocks in enumerate(documents)]
    requests += [
        call(n, 0.001 * n, [*documents[n - 30], 10**6 + n], 2, ttft_slo_s=1000.0)
        for n in range(30, 60)
    ]
    workload = recorded(requests)
    settings = server(
        device_blocks=120,
        host_blocks=400,
        disk_blocks=5000,
        disk=DiskSpec(read_bandwidth=60e9, write_bandwidth=60e9),
        policy=policy,
        chunk_tokens=2560,
    )
    assert found(workload, settings) >= 0.95 * unlimited(workload)


def two_kinds_of_session() -> RecordedWorkload:
    """The one returns in a second, the other in ten, and says so; as much of each."""
    requests = []
    for turn in range(40):
        for session in range(12):
            is_fast = session < 3
            if is_fast or turn % 10 == 0:
                hint_s = 1.0 if is_fast else 10.0
                blocks = [1000 * (session + 1) + at for at in range(20)]
                at_s = turn + session * 0.05
                requests.append(
                    call(len(requests), at_s, blocks, 2, session=session, next_use_hint_s=hint_s)
                )
    return recorded(requests)


def test_knowing_when_sessions_return_finds_more_than_recency() -> None:
    workload = two_kinds_of_session()
    lru, kvflow = (
        found(workload, server(device_blocks=85, eviction=eviction))
        for eviction in ("lru", "kvflow")
    )
    assert kvflow > 1.1 * lru


@pytest.mark.parametrize("eviction", ["lru", "tlru"])
def test_hints_protect_what_is_expected_soon_unless_forecasts_are_ignored(eviction: str) -> None:
    workload = two_kinds_of_session()
    alone, ignored, hinted = (
        found(workload, server(device_blocks=85, eviction=eviction, **settings))
        for settings in ({}, {"hints": True, "protect_expected": False}, {"hints": True})
    )
    assert ignored == alone
    assert hinted > 1.05 * alone


def test_a_session_that_ended_leaves_the_host_first() -> None:
    # Session 0 ends with its second call; 1 and 2 come back. The host holds two of the three.
    prompts = {session: [1000 * (session + 1) + at for at in range(40)] for session in range(3)}
    calls = [(0, 5.0), (1, 50.0), (0, None), (2, 50.0), (1, None), (2, None)]
    requests = [
        call(index, 10.0 * index, prompts[session], 2, session=session, next_use_hint_s=hint_s)
        for index, (session, hint_s) in enumerate(calls)
    ]
    settings = server(device_blocks=60, host_blocks=85, eviction="kvflow")
    hits = [
        record.device_hit_tokens + record.host_hit_tokens
        for record in Simulation(recorded(requests), settings).run().records
    ]
    assert [hit > 0 for hit in hits] == [False, False, True, False, True, True]
    assert min(hits[4:]) == 40 * BLOCK_TOKENS


def test_belady_refuses_arrivals_that_depend_on_answers() -> None:
    workload = Agents().build(0)
    with pytest.raises(ConfigError, match="kvflow"):
        Simulation(workload, server(eviction="belady"))


def test_nobody_finds_more_than_an_infinite_cache_under_load() -> None:
    workload = recorded(random_requests(2, 200))
    infinite = found(workload, server(device_blocks=300, host_blocks=100_000))
    for eviction in ("lru", "belady"):
        small = server(device_blocks=300, host_blocks=100, eviction=eviction)
        assert found(workload, small) <= infinite


def test_whole_leaves_go_where_the_manager_would_keep_their_head() -> None:
    # The second prompt is 5 blocks too long for both to stay.
    requests = [
        call(0, 0.0, range(1, 41)),
        call(1, 10.0, range(100, 125)),
        call(2, 20.0, range(1, 41)),
    ]
    kept = {}
    for whole in (False, True):
        settings = server(device_blocks=62, whole_leaves=whole)
        result, _ = simulate(requests, settings)
        kept[whole] = result.records[2].device_hit_tokens // BLOCK_TOKENS
    assert kept[True] == 0
    assert 30 <= kept[False] < 40
