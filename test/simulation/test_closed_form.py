"""Cases whose answer can be worked out by hand from the cost model."""

from __future__ import annotations

import numpy as np
import pytest

from support_simulation.builders import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    MODEL,
    call,
    recorded,
    server,
    simulate,
)
from tiered_kv.memory.probes import PROBE_PAGES
from tiered_kv.simulation.settings import DiskSpec


def test_one_request_alone_takes_what_the_cost_model_says() -> None:
    settings = server()
    costs = settings.costs()
    result, _ = simulate([call(0, 3.0, range(1, 51), output_tokens=20)], settings)
    (record,) = result.records
    n_tokens = 50 * BLOCK_TOKENS + 1
    assert record.admitted_s == 3.0
    assert record.ttft_s == pytest.approx(costs.prefill_s(n_tokens))
    decode_s = sum(costs.iteration_s((), n_tokens + at, 1) for at in range(19))
    assert record.finish_s == pytest.approx(3.0 + costs.prefill_s(n_tokens) + decode_s)
    assert record.mean_tbt_s == pytest.approx(decode_s / 19)
    assert result.n_iterations == 20


def test_a_long_prompt_goes_in_chunks_that_see_what_came_before() -> None:
    settings = server(chunk_tokens=1024)
    costs = settings.costs()
    n_tokens = 50 * BLOCK_TOKENS + 1
    result, _ = simulate([call(0, 0.0, range(1, 51), output_tokens=1)], settings)
    starts = range(0, n_tokens, 1024)
    expected_s = sum(costs.prefill_s(min(1024, n_tokens - at), at) for at in starts)
    assert result.records[0].ttft_s == pytest.approx(expected_s)
    assert result.records[0].mean_tbt_s is None
    assert result.n_iterations == len(starts)


def test_a_repeated_prompt_computes_its_tail_only() -> None:
    settings = server()
    requests = [call(index, 10.0 * index, range(1, 51)) for index in range(2)]
    result, _ = simulate(requests, settings)
    second = result.records[1]
    assert second.device_hit_tokens == 50 * BLOCK_TOKENS
    assert second.ttft_s == pytest.approx(settings.costs().prefill_s(1, 50 * BLOCK_TOKENS))


def test_a_prefix_from_the_host_is_loaded_under_the_prefill() -> None:
    # The filler takes the whole device, so that the prompt is left on the host alone.
    settings = server(device_blocks=60, host_blocks=500)
    costs = settings.costs()
    requests = [
        call(0, 0.0, range(1, 41)),
        call(1, 10.0, range(100, 155)),
        call(2, 20.0, range(1, 41)),
    ]
    result, simulation = simulate(requests, settings)
    third = result.records[2]
    cached = 40 * BLOCK_TOKENS
    assert third.device_hit_tokens + third.host_hit_tokens == cached
    assert third.host_hit_tokens > 0
    link = costs.edge(*_host_to_device())
    load_s = link.latency_s + third.host_hit_tokens / BLOCK_TOKENS * BLOCK_BYTES / link.bandwidth
    compute_s = costs.prefill_s(1, cached)
    assert load_s > compute_s
    assert third.ttft_s == pytest.approx(load_s + compute_s / MODEL.n_layers)
    assert simulation.instances[0].cache.to_device.n_bytes == (
        third.host_hit_tokens // BLOCK_TOKENS * BLOCK_BYTES
    )


def _host_to_device() -> tuple[object, object]:
    from tiered_kv.core.ids import Tier

    return Tier.HOST, Tier.DEVICE


def disk_requests() -> list[object]:
    """The third call's prompt is on disk alone."""
    return [
        call(0, 0.0, range(1, 41)),
        call(1, 10.0, range(100, 155)),
        call(2, 20.0, range(200, 255)),
        call(3, 30.0, range(1, 41)),
    ]


def disk_server(stop_policy: str, bandwidth: float = 1e9) -> object:
    return server(
        device_blocks=60,
        host_blocks=90,
        disk_blocks=500,
        stop_policy=stop_policy,
        disk=DiskSpec(read_bandwidth=bandwidth),
    )


def test_a_prefix_from_disk_is_waited_for() -> None:
    settings = disk_server("wait_complete")
    result, _ = simulate(disk_requests(), settings)
    last = result.records[3]
    read_s = last.disk_hit_tokens / BLOCK_TOKENS * BLOCK_BYTES / 1e9
    assert last.disk_hit_tokens >= 30 * BLOCK_TOKENS
    assert last.admitted_s - last.arrival_s == pytest.approx(read_s + 2e-4)


def test_best_effort_takes_what_has_come_and_computes_the_rest() -> None:
    result, _ = simulate(disk_requests(), disk_server("best_effort"))
    last = result.records[3]
    assert last.admitted_s == last.arrival_s
    # The server was idle, so nothing had come.
    assert last.disk_hit_tokens == 0


def test_a_timeout_takes_what_came_until_then() -> None:
    # 40 blocks of 8.4 MB at 50 MB/s take 6.7 s; patience ends after 2 s + 0.1 s per 1024 tokens.
    settings = disk_server("timeout", bandwidth=50e6)
    result, _ = simulate(disk_requests(), settings)
    last = result.records[3]
    wanted = 40 * BLOCK_TOKENS
    patience_s = 2.0 + 0.1 * wanted / 1024
    assert last.admitted_s - last.arrival_s == pytest.approx(patience_s, rel=1e-3)
    came = int((patience_s - 2e-4) * 50e6 / BLOCK_BYTES) * BLOCK_TOKENS
    assert last.disk_hit_tokens == pytest.approx(came, abs=BLOCK_TOKENS)
    assert 0 < last.disk_hit_tokens < wanted


def test_what_is_sooner_computed_than_read_is_not_read() -> None:
    requests = disk_requests()
    for bandwidth, is_read in ((100e9, True), (1e6, False)):
        settings = server(
            device_blocks=60,
            host_blocks=90,
            disk_blocks=500,
            disk=DiskSpec(read_bandwidth=bandwidth),
            load_policy="cost",
            stop_policy="patience",
        )
        result, simulation = simulate(requests, settings)
        assert (result.records[3].disk_hit_tokens > 0) == is_read
        n_bytes = simulation.instances[0].cache.from_disk.n_bytes
        # Some pages are read whatever they cost, now and then, to see how long it takes.
        assert (n_bytes > PROBE_PAGES * BLOCK_BYTES) == is_read
        always, _ = simulate(requests, disk_server("wait_complete", bandwidth))
        assert result.records[3].ttft_s <= always.records[3].ttft_s * (1 + 1e-9)


def test_two_calls_for_the_same_pages_share_one_read() -> None:
    settings = disk_server("wait_complete")
    requests = [*disk_requests(), call(4, 30.001, range(1, 41))]
    result, simulation = simulate(requests, settings)
    first, second = result.records[3:]
    assert second.admitted_s >= first.admitted_s
    read = simulation.instances[0].cache.from_disk.n_bytes
    assert read == first.disk_hit_tokens // BLOCK_TOKENS * BLOCK_BYTES


def test_waits_at_random_arrivals_are_those_of_an_m_d_1_queue() -> None:
    # Prompts of one chunk, one token of answer, and nothing shared: a single server with a
    # constant service time. Pollaczek and Khinchine: mean wait = rho * s / (2 * (1 - rho)).
    settings = server(device_blocks=5000)
    n_tokens = 8191
    service_s = settings.costs().prefill_s(n_tokens)
    load = 0.7
    random = np.random.default_rng(5)
    arrivals = np.cumsum(random.exponential(service_s / load, 6000))
    requests = [
        call(index, at_s, range(200 * index, 200 * index + 127), 1, n_tokens - 127 * BLOCK_TOKENS)
        for index, at_s in enumerate(arrivals.tolist())
    ]
    result, _ = simulate(recorded(requests), settings)
    waits = np.array([record.admitted_s - record.arrival_s for record in result.records])
    expected_s = load * service_s / (2 * (1 - load))
    assert result.busy_s / result.end_s == pytest.approx(load, rel=0.05)
    assert waits.mean() == pytest.approx(expected_s, rel=0.1)
    assert np.all(np.diff([record.first_token_s for record in result.records]) > 0)


def test_running_requests_stall_while_a_prompt_is_computed_unless_chunks_are_mixed() -> None:
    requests = [
        call(0, 0.0, [1], output_tokens=200),
        call(1, 0.5, range(100, 600), output_tokens=1),
    ]
    apart, _ = simulate(requests, server(chunk_tokens=2048))
    mixed, _ = simulate(requests, server(chunk_tokens=2048, mixed_chunk=True))
    costs = server().costs()
    n_tokens = 500 * BLOCK_TOKENS + 1
    stall_s = sum(costs.prefill_s(min(2048, n_tokens - at), at) for at in range(0, n_tokens, 2048))
    step_s = costs.iteration_s((), 200, 1)
    assert apart.records[0].max_tbt_s == pytest.approx(stall_s + step_s, rel=0.02)
    assert mixed.records[0].max_tbt_s < stall_s / 5
    assert mixed.records[1].ttft_s > apart.records[1].ttft_s


def test_under_cascade_a_decode_pass_reads_a_shared_prefix_once() -> None:
    settings = server(cascade=True, chunk_tokens=16384)
    costs = settings.costs()
    # Requests 0 to 2 begin alike, and of those 0 and 1 go on alike; 3 shares nothing.
    prompts = [
        [*range(1, 41), *range(50, 60), 70],
        [*range(1, 41), *range(50, 60), 80, 81],
        [*range(1, 41), 90],
        list(range(100, 120)),
    ]
    # They arrive while another prompt is computed, so that all start in the pass after it.
    requests = [call(9, 0.0, range(200, 220), output_tokens=1)]
    requests += [call(at, 1e-4, blocks, output_tokens=10) for at, blocks in enumerate(prompts)]
    result, _ = simulate(requests, settings)
    plain, _ = simulate(requests, server(chunk_tokens=16384))

    saved = (2 * 40 + 10) * BLOCK_TOKENS
    context = sum(len(blocks) * BLOCK_TOKENS + 1 for blocks in prompts)
    passes_s = [costs.iteration_s((), context + 4 * at, 4, saved) for at in range(9)]
    times = [record.finish_s - record.first_token_s for record in result.records[1:]]
    assert times == pytest.approx([sum(passes_s)] * 4)
    read_s = (
        saved
        * MODEL.kv_bytes_per_token
        / (settings.device.memory_bandwidth * settings.device.bandwidth_efficiency)
    )
    slower = [record.finish_s - record.first_token_s for record in plain.records[1:]]
    assert slower == pytest.approx([sum(passes_s) + 9 * read_s] * 4)


def test_who_leaves_the_batch_takes_its_share_of_the_prefix_along() -> None:
    settings = server(cascade=True)
    costs = settings.costs()
    requests = [
        call(9, 0.0, range(200, 220), output_tokens=1),
        call(0, 1e-4, range(1, 41), output_tokens=2),
        call(1, 1e-4, range(1, 41), output_tokens=3),
    ]
    result, _ = simulate(requests, settings)
    n_tokens = 40 * BLOCK_TOKENS + 1
    both_s = costs.iteration_s((), 2 * n_tokens, 2, 40 * BLOCK_TOKENS)
    alone_s = costs.iteration_s((), n_tokens + 1, 1)
    last = result.records[2]
    assert last.finish_s - last.first_token_s == pytest.approx(both_s + alone_s)


def test_who_arrives_during_a_pass_is_looked_at_after_it() -> None:
    # Nothing is processed between that look and the next plan: all ratios are 0, the queue decides.
    settings = server(policy="hrrn", chunk_tokens=1024, max_prefill_tokens=1024)
    requests = [
        call(0, 0.0, range(100, 115), output_tokens=1),
        call(1, 1e-4, range(1, 31), output_tokens=1),
        call(2, 2e-4, range(200, 210), output_tokens=1),
    ]
    result, _ = simulate(requests, settings)
    _, long, short = result.records
    assert long.admitted_s < short.admitted_s
