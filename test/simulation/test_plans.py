"""What a plan can ask for beyond an order: shared prefixes, putting back, memory, loads."""

from __future__ import annotations

from array import array

import pytest

from support_simulation.builders import BLOCK_TOKENS, call, server, simulate
from tiered_kv.core.ids import Tier
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.workload.request import RecordedWorkload, Request

TIGHT = {"slo_class": "interactive", "ttft_slo_s": 0.5, "tbt_slo_s": 0.05}


def gang(n: int) -> list[Request]:
    """Calls at one instant over one document of 100 blocks, with a question of 2 blocks each."""
    document = list(range(1, 101))
    return [call(i, 0.0, [*document, 1000 + 2 * i, 1001 + 2 * i]) for i in range(n)]


def test_a_prefix_that_many_need_is_computed_once() -> None:
    results = {}
    for gangs in (True, False):
        settings = server(policy="slack", slack=SlackConfig(gangs=gangs))
        result, _ = simulate(gang(8), settings)
        assert all(record.finish_s is not None for record in result.records)
        results[gangs] = result
    own, document = 2 * BLOCK_TOKENS + 1, 100 * BLOCK_TOKENS
    assert results[True].processed_prefill_tokens == document + 8 * own
    assert results[False].processed_prefill_tokens > 2 * document
    last = {gangs: max(r.ttft_s for r in result.records) for gangs, result in results.items()}
    assert last[True] < last[False]


def test_a_long_prompt_is_put_back_and_loses_no_whole_block() -> None:
    requests = [
        call(0, 0.0, range(1, 801), slo_class="batch", ttft_slo_s=30.0),
        call(1, 0.4, range(5001, 5021), **TIGHT),
    ]
    yielding, _ = simulate(requests, server(policy="slack"))
    stubborn, _ = simulate(requests, server(policy="slack", slack=SlackConfig(put_back=False)))
    assert yielding.records[1].ttft_s < 0.5 < stubborn.records[1].ttft_s
    assert yielding.records[0].ttft_s < 30.0
    n_tokens = sum(request.input_tokens for request in requests)
    assert stubborn.processed_prefill_tokens == n_tokens
    assert n_tokens <= yielding.processed_prefill_tokens < n_tokens + 2 * BLOCK_TOKENS


@pytest.mark.parametrize("mixes", [True, False])
def test_chunks_keep_the_tokens_of_those_who_run_in_time(mixes: bool) -> None:
    requests = [
        call(0, 0.0, range(1, 11), output_tokens=60, **TIGHT),
        *(call(i, 0.1, range(1000 * i, 1000 * i + 150)) for i in range(1, 6)),
    ]
    settings = server(policy="slack", slack=SlackConfig(mix_decodes=mixes))
    result, _ = simulate(requests, settings)
    assert result.records[0].mean_tbt_s <= 0.05
    plain, _ = simulate(requests, server(policy="fcfs"))
    assert plain.records[0].mean_tbt_s > 0.01
    assert all(record.finish_s is not None for record in result.records)


def test_answers_longer_than_promised_retract_nobody_once_lengths_are_known() -> None:
    """Pools are short, outputs long: upstream's ratio admits too many, the forecast does not."""

    def retractions(policy: str) -> int:
        requests = [
            call(i, 0.02 * i, [100 * i + at for at in range(8)], output_tokens=700)
            for i in range(1, 81)
        ]
        settings = server(
            policy=policy, device_blocks=200, init_new_token_ratio=0.1, max_new_tokens=2048
        )
        return simulate(requests, settings)[0].n_retractions

    assert retractions("fcfs") > 0
    assert retractions("slack") == 0


def test_what_is_expected_is_loaded_ahead_into_free_pages_only() -> None:
    settings = server(device_blocks=100, host_blocks=500)
    requests = [call(0, 0.0, range(1, 41)), call(1, 10.0, range(1001, 1091))]
    simulation = Simulation(RecordedWorkload("test", BLOCK_TOKENS, requests), settings)
    simulation.run()
    cache = simulation.instances[0].cache
    path = cache.forest.match(cache.root, array("q", range(1, 41))).path
    on_host = [node for node in path if node.state(Tier.HOST).name == "RESIDENT"]
    before = cache.forest.resident_tokens(Tier.DEVICE)
    cache.forecast(DemandForecast({on_host[-1].node_id: Expectation(0.1)}))
    assert len(cache.to_device) == 0, "the device has no free pages"
    # What fills the device goes; then there is room, less what stays in reserve.
    cache._evict(Tier.DEVICE, before)
    cache.forecast(DemandForecast({on_host[-1].node_id: Expectation(0.1)}))
    assert len(cache.to_device) == 1
    while simulation._events.fire_next():
        pass
    assert cache.forest.resident_tokens(Tier.DEVICE) == 40
    cache.forest.check_integrity()
