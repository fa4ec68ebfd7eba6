"""What policies believe of the machine, apart from what is true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support_simulation.builders import BLOCK_TOKENS, call, random_requests, server, simulate
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.simulation.settings import Belief, InstanceSettings
from tiered_kv.simulation.statistics import meets_slo

BIASES = (0.7, 1.4)


def believing(belief: Belief, **more: object) -> InstanceSettings:
    settings = server(device_blocks=600, host_blocks=300, disk_blocks=800, policy="slack", **more)
    return replace(settings, belief=belief)


def test_a_belief_is_off_by_its_factors() -> None:
    settings = believing(Belief(prefill=0.5, decode=2.0, links=3.0))
    true, believed = settings.costs(), settings.believed()
    assert believed.prefill_s(5000, 100) == pytest.approx(0.5 * true.prefill_s(5000, 100))
    whole = ((), 50_000, 20)
    assert believed.iteration_s(*whole) == pytest.approx(2.0 * true.iteration_s(*whole))
    moved = (Tier.DISK, Tier.HOST, 10**9)
    assert believed.load_s(*moved) == pytest.approx(3.0 * true.load_s(*moved))


def test_who_knows_the_truth_decides_as_before_whether_it_learns_or_not() -> None:
    requests = random_requests(5, 200)
    known, _ = simulate(requests, believing(Belief()))
    learned, _ = simulate(requests, believing(Belief(learns=True)))
    ttfts = [[record.ttft_s for record in result.records] for result in (known, learned)]
    assert np.mean(ttfts[1]) == pytest.approx(np.mean(ttfts[0]), rel=0.02)


@pytest.mark.parametrize("bias", BIASES)
def test_what_is_true_is_learned_from_passes_and_transfers(bias: float) -> None:
    settings = believing(Belief(prefill=bias, decode=bias, links=bias, learns=True))
    _, simulation = simulate(random_requests(6, 300), settings)
    (instance,) = simulation.instances
    true, believed = settings.costs(), instance._believed.costs
    # Within the range of what it saw.
    assert believed.prefill_s(2000) == pytest.approx(true.prefill_s(2000), rel=0.03)
    decode = ((), 30 * 2500, 30)
    assert believed.iteration_s(*decode) == pytest.approx(true.iteration_s(*decode), rel=0.03)
    for source, target in ((Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DISK)):
        n_bytes = 16 * BLOCK_TOKENS * settings.model.kv_bytes_per_token
        moved = (source, target, n_bytes)
        assert believed.load_s(*moved) == pytest.approx(true.load_s(*moved), rel=0.05)


@pytest.mark.parametrize("bias", BIASES)
def test_the_truth_is_untouched_by_what_is_believed(bias: float) -> None:
    requests = [call(0, 0.0, range(1, 51), output_tokens=20)]
    known, _ = simulate(requests, believing(Belief()))
    wrong, _ = simulate(requests, believing(Belief(prefill=bias, decode=bias, links=bias)))
    assert wrong.records[0].ttft_s == pytest.approx(known.records[0].ttft_s)
    assert wrong.records[0].finish_s == pytest.approx(known.records[0].finish_s)


def test_a_belief_without_a_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="a factor over 0"):
        Belief(prefill=0.0)


@pytest.mark.long
def test_who_learns_keeps_nine_tenths_of_what_the_truth_gives() -> None:
    """After 100 requests, with passes that vary by 10%, beyond what the server bears."""
    requests = random_requests(11, 500, rate=60.0)

    def met(belief: Belief) -> float:
        noise = 0.0 if belief == Belief() else 0.1
        result, _ = simulate(requests, replace(believing(belief), noise=noise))
        judged = result.records[100:]
        return sum(meets_slo(record) for record in judged) / len(judged)

    with_truth = met(Belief())
    assert 0.2 < with_truth < 0.95, "else there is nothing to lose"
    for bias in BIASES:
        kept = met(Belief(prefill=bias, decode=bias, links=bias, learns=True)) / with_truth
        assert kept >= 0.9, (bias, kept)
