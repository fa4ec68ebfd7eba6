"""Who decodes, and who makes way, in the simulated server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support_simulation.builders import (
    BLOCK_TOKENS,
    call,
    random_requests,
    recorded,
    server,
    simulate,
)
from support_simulation.conservation import assert_conserved, watched
from tiered_kv.core.errors import ConfigError
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.simulation.statistics import summarize
from tiered_kv.simulation.workload.request import Request

POLICIES = ("slack", "round-robin")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("order", ["fcfs", "slack"])
@pytest.mark.parametrize("cascade", [False, True])
def test_every_token_comes_once_whoever_is_parked(
    policy: str, swap: bool, order: str, cascade: bool
) -> None:
    settings = server(
        device_blocks=120,
        host_blocks=150,
        max_new_tokens=64,
        init_new_token_ratio=0.05,
        iteration_policy=policy,
        iteration=IterationConfig(relegate=True, max_park_s=0.2),
        swap=swap,
        policy=order,
        cascade=cascade,
    )
    requests = random_requests(3, 90, rate=60.0)
    for request in requests[::3]:
        request.tbt_slo_s = 0.006
    result, simulation = watched(recorded(requests), settings)
    assert_conserved(result, simulation, len(requests))
    for record in result.records:
        assert record.n_gaps == record.output_tokens - 1
    assert (result.n_retractions if swap else result.n_swaps) == 0


def crowd(**more: object) -> list[Request]:
    """At once: 20 who want a token every 25 ms, 20 every 100 ms, and 4 long ones whenever."""
    kinds = [(20, 12_000, 0.025), (20, 20_000, 0.1), (4, 40_000, None)]
    requests: list[Request] = []
    for n, tokens, tbt_s in kinds:
        for _ in range(n):
            index = len(requests)
            first = index * 10_000
            blocks = range(first, first + tokens // BLOCK_TOKENS)
            name = "none" if tbt_s is None else f"{1000 * tbt_s:.0f} ms"
            requests.append(call(index, 0.0, blocks, 600, slo_class=name, tbt_slo_s=tbt_s, **more))
    return requests


def test_the_tightest_are_in_time_where_all_together_are_late() -> None:
    settings = server(device_blocks=14_000)
    everyone = summarize(simulate(crowd(), settings)[0])["classes"]
    chosen = summarize(simulate(crowd(), replace(settings, iteration_policy="slack"))[0])["classes"]
    assert everyone["25 ms"]["tbt_attainment"] == 0.0
    assert chosen["25 ms"]["tbt_attainment"] > 0.9
    assert chosen["100 ms"]["tbt_attainment"] == 1.0
    assert everyone["25 ms"]["late_gap_share"] > 2 * chosen["25 ms"]["late_gap_share"]


def test_without_objectives_all_takes_as_long_as_without_a_policy() -> None:
    requests = random_requests(5, 80)
    for request in requests:
        request.tbt_slo_s = request.ttft_slo_s = None
    settings = server(device_blocks=2000)
    plain, _ = simulate(requests, settings)
    chosen, _ = simulate(requests, replace(settings, iteration_policy="slack"))
    assert chosen.end_s == pytest.approx(plain.end_s, rel=0.02)
    assert chosen.busy_s == pytest.approx(plain.busy_s, rel=0.02)


def test_kv_that_is_kept_is_not_computed_again() -> None:
    # Limits far below what is really produced: admission promises too much.
    requests = [
        replace(request, output_tokens=600 + 10 * (request.request_id % 40))
        for request in random_requests(5, 60, rate=200.0)
    ]
    settings = server(
        device_blocks=200,
        host_blocks=2000,
        max_new_tokens=1,
        init_new_token_ratio=0.01,
    )
    dropped, _ = simulate(requests, settings)
    kept, simulation = watched(recorded(requests), replace(settings, swap=True))
    assert_conserved(kept, simulation, 60)
    assert dropped.n_retractions > 0
    assert kept.n_retractions == 0 < kept.n_swaps
    assert kept.processed_prefill_tokens < dropped.processed_prefill_tokens


def test_one_without_an_objective_makes_way_for_one_that_has_one() -> None:
    batch = [call(n, 0.0, range(1000 * n, 1000 * n + 25), 600) for n in range(3)]
    urgent = call(3, 1.0, range(9000, 9040), 20, tbt_slo_s=0.05, ttft_slo_s=0.5)
    settings = server(device_blocks=120, host_blocks=500, max_new_tokens=None)
    waited, _ = simulate([*batch, urgent], replace(settings, iteration_policy="slack"))
    went, simulation = simulate(
        [*batch, urgent], replace(settings, iteration_policy="slack", swap=True)
    )
    assert waited.records[3].ttft_s > 1.0
    assert went.records[3].ttft_s < 0.5
    assert went.n_swaps >= 1
    assert all(record.finish_s is not None for record in went.records)
    assert simulation.instances[0].cache.private_tokens == 0


def test_nobody_makes_way_for_others_twice() -> None:
    job = call(0, 0.0, range(1000, 1085), 1000)
    urgent = [
        call(n, 2.0 * n - 1.0, range(9000 * n, 9000 * n + 40), 20, tbt_slo_s=0.05, ttft_slo_s=0.5)
        for n in (1, 2)
    ]
    settings = server(device_blocks=120, host_blocks=500, max_new_tokens=None)
    result, _ = simulate([job, *urgent], replace(settings, iteration_policy="slack", swap=True))
    gone, first, second = (result.records[n] for n in range(3))
    assert gone.n_swaps == 1
    assert first.ttft_s is not None
    assert first.ttft_s < 0.5
    assert second.finish_s is not None
    assert gone.finish_s is not None
    assert second.first_token_s is not None
    assert second.first_token_s > gone.finish_s, "the job is not asked again"


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="round-robin, slack"):
        simulate([], server(iteration_policy="best"))
