"""A simulation that is looked into after every event, and what must hold at its end."""

from __future__ import annotations

import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.simulation.engine import Simulation, SimulationResult
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.workload.request import Workload


def watched(
    workload: Workload, settings: InstanceSettings, every: int = 50
) -> tuple[SimulationResult, Simulation]:
    """Run, and check the pools after every event, the forest's books after every 50th."""
    simulation = Simulation(workload, settings, seed=1)
    (instance,) = simulation.instances
    cache, events = instance.cache, simulation._events
    fire_next, n_fired = events.fire_next, 0

    def fire_and_look() -> bool:
        nonlocal n_fired
        more = fire_next()
        n_fired += 1
        # A prompt that was begun goes on while decoding makes room for it.
        assert cache.used_tokens <= cache.capacity_tokens
        host = cache.forest
        on_host = host.evictable_tokens(Tier.HOST) + host.protected_tokens(Tier.HOST)
        assert on_host <= cache.host_units
        assert cache.disk is None or len(cache.disk) <= settings.cache.disk_bytes
        assert instance.n_running <= settings.max_running
        if n_fired % every == 0:
            host.check_integrity()
            live = instance._live.values()
            assert cache.private_tokens == sum(one.private_tokens for one in live)
            assert all(one.private_tokens >= 0 for one in live)
        return more

    events.fire_next = fire_and_look
    return simulation.run(), simulation


def assert_conserved(result: SimulationResult, simulation: Simulation, n: int) -> None:
    records = result.records
    assert sorted(record.request_id for record in records) == list(range(n))
    assert all(record.finish_s is not None for record in records)
    for record in records:
        assert record.arrival_s <= record.admitted_s <= record.first_token_s <= record.finish_s
        assert record.finish_s <= result.end_s
        hit = record.device_hit_tokens + record.host_hit_tokens + record.disk_hit_tokens
        assert 0 <= hit < record.input_tokens
        if record.output_tokens > 1:
            spent_s = record.finish_s - record.first_token_s
            assert record.mean_tbt_s == pytest.approx(spent_s / (record.output_tokens - 1))
            assert record.mean_tbt_s <= record.max_tbt_s * (1 + 1e-9)
            assert record.p99_tbt_s <= record.max_tbt_s
    went_back = result.n_retractions + result.n_swaps
    if not went_back and not any(i.departures.n_put_back for i in simulation.instances):
        computed = sum(
            record.input_tokens
            - record.device_hit_tokens
            - record.host_hit_tokens
            - record.disk_hit_tokens
            for record in records
        )
        assert result.processed_prefill_tokens == computed
    (instance,) = simulation.instances
    cache = instance.cache
    assert cache.private_tokens == 0
    assert instance.n_running == 0
    assert len(instance.waiting) == 0
    for tier in (Tier.DEVICE, Tier.HOST):
        assert cache.forest.protected_tokens(tier) == 0
    cache.forest.check_integrity(deep=True)
