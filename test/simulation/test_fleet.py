"""Several servers with a store between them, against what can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from support_simulation.builders import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    MODEL,
    call,
    random_requests,
    server,
    simulate,
)
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.simulation.routers import make_router
from tiered_kv.simulation.settings import CacheSettings, InstanceSettings, SharedStoreSpec
from tiered_kv.simulation.workload.request import Request

#: Long enough to be worth sharing at its first use.
LONG = range(1, 401)


def sharing(writes: str = "value", blocks: int = 5000, **more: object) -> InstanceSettings:
    settings = server(host_blocks=1000, load_policy="cost", stop_policy="patience", **more)
    spec = SharedStoreSpec(capacity_bytes=blocks * BLOCK_BYTES, bandwidth=10e9, writes=writes)
    return replace(settings, cache=replace(settings.cache, shared=spec))


def by_id(request: Request, instances: Sequence[object]) -> int:
    return request.request_id % len(instances)


def test_what_one_server_computed_another_reads() -> None:
    settings = sharing()
    always = replace(settings.cache, load_policy="always", stop_policy="wait_complete")
    settings = replace(settings, cache=always)
    requests = [call(0, 0.0, LONG), call(1, 20.0, LONG)]
    result, _ = simulate(requests, settings, n_instances=2, router=by_id)
    first, second = result.records
    assert first.shared_hit_tokens == 0
    assert second.shared_hit_tokens == 400 * BLOCK_TOKENS
    assert (second.device_hit_tokens, second.host_hit_tokens, second.disk_hit_tokens) == (0, 0, 0)
    read_s = 1e-3 + 400 * BLOCK_BYTES / 10e9
    assert second.admitted_s - second.arrival_s == pytest.approx(read_s)
    costs = settings.costs()
    link = costs.edge(Tier.HOST, Tier.DEVICE)
    load_s = link.latency_s + 400 * BLOCK_BYTES / link.bandwidth
    tail_s = costs.prefill_s(1, 400 * BLOCK_TOKENS) / MODEL.n_layers
    assert second.ttft_s == pytest.approx(read_s + load_s + tail_s)
    assert second.ttft_s < first.ttft_s / 2
    assert result.links["store to host"].n_bytes == 400 * BLOCK_BYTES


def test_without_a_store_it_is_computed_again() -> None:
    settings = sharing()
    alone = replace(settings, cache=replace(settings.cache, shared=None))
    requests = [call(0, 0.0, LONG), call(1, 20.0, LONG)]
    result, _ = simulate(requests, alone, n_instances=2, router=by_id)
    first, second = result.records
    assert second.ttft_s == pytest.approx(first.ttft_s)
    assert "store to host" not in result.links


def test_a_short_prefix_is_shared_when_it_is_used_again() -> None:
    # Ten blocks take less than half a second to compute: nobody else gets them for one use.
    requests = [call(n, 10.0 * n, range(1, 11)) for n in (0, 2, 4)] + [call(7, 70.0, range(1, 11))]
    result, simulation = simulate(requests, sharing(), n_instances=2, router=by_id)
    assert result.records[3].shared_hit_tokens == 10 * BLOCK_TOKENS
    once = [requests[0], requests[3]]
    result, simulation = simulate(once, sharing(), n_instances=2, router=by_id)
    assert result.records[1].shared_hit_tokens == 0
    assert len(simulation.shared) == 0
    result, _ = simulate(once, sharing("all"), n_instances=2, router=by_id)
    assert result.records[1].shared_hit_tokens == 10 * BLOCK_TOKENS


def test_what_the_store_gave_up_is_computed() -> None:
    # The second prompt drives the first out.
    requests = [
        call(0, 0.0, LONG),
        call(2, 20.0, range(1001, 1401)),
        call(3, 40.0, LONG),
    ]
    result, simulation = simulate(requests, sharing(blocks=401), n_instances=2, router=by_id)
    assert result.records[2].shared_hit_tokens == 0
    assert len(simulation.shared) <= 401


def test_the_disk_is_nearer_than_the_store() -> None:
    settings = sharing("all", disk_blocks=2000, device_blocks=450)
    small = replace(settings, cache=replace(settings.cache, host_bytes=450 * BLOCK_BYTES))
    requests = [
        call(0, 0.0, LONG),
        call(2, 20.0, range(1001, 1401)),
        call(4, 40.0, range(2001, 2401)),
        call(6, 60.0, LONG),
    ]
    result, _ = simulate(requests, small, n_instances=2, router=by_id)
    last = result.records[3]
    assert last.disk_hit_tokens > 200 * BLOCK_TOKENS
    assert last.shared_hit_tokens == 0


@pytest.mark.parametrize("routing", ["random", "session", "cache-aware"])
@pytest.mark.parametrize("writes", ["value", "all"])
def test_whatever_the_routing_every_request_is_answered_once(routing: str, writes: str) -> None:
    settings = sharing(writes, device_blocks=260, disk_blocks=400)
    small = replace(settings, cache=replace(settings.cache, host_bytes=150 * BLOCK_BYTES))
    result, simulation = simulate(
        random_requests(8, 200), small, n_instances=3, router=make_router(routing)
    )
    assert [record.request_id for record in result.records] == list(range(200))
    assert all(record.finish_s is not None for record in result.records)
    hits = sum(
        record.device_hit_tokens
        + record.host_hit_tokens
        + record.disk_hit_tokens
        + record.shared_hit_tokens
        for record in result.records
    )
    n_tokens = sum(record.input_tokens for record in result.records)
    if not result.n_retractions:
        assert result.processed_prefill_tokens == n_tokens - hits
    for instance in simulation.instances:
        instance.cache.forest.check_integrity(deep=True)
        for tier in (Tier.DEVICE, Tier.HOST):
            assert instance.cache.forest.protected_tokens(tier) == 0


def test_a_store_without_a_host_is_refused() -> None:
    spec = SharedStoreSpec(capacity_bytes=1)
    with pytest.raises(ConfigError, match="host tier"):
        CacheSettings(shared=spec)
    with pytest.raises(ConfigError, match="one of value, all"):
        SharedStoreSpec(capacity_bytes=1, writes="some")
