"""The cost model against figures worked out by hand, and laws that any roofline obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tiered_kv.core.device_spec import DeviceSpec, find_device
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import ModelSpec, find_model
from tiered_kv.scheduler.cost_model import Correction, CostModel, EdgeCost

EDGES = {
    (Tier.HOST, Tier.DEVICE): EdgeCost(bandwidth=40e9, latency_s=1e-5),
    (Tier.DISK, Tier.HOST): EdgeCost(bandwidth=4e9, latency_s=1e-4),
}

#: 10 GFLOP per token's body, 1 per logits, 1 MB of KV per token, 10 GB of weights.
MODEL = ModelSpec(
    name="round",
    n_layers=10,
    hidden_size=1000,
    intermediate_size=4000,
    n_heads=10,
    n_kv_heads=10,
    head_dim=100,
    vocab_size=500_000,
    n_parameters=6_000_000_000,
    n_active_parameters=6_000_000_000,
    weight_bytes_per_parameter=10 / 6,
    kv_bytes_per_element=50,
)
DEVICE = DeviceSpec(
    name="round",
    memory_bytes=10**11,
    flops=2e14,
    memory_bandwidth=2e12,
    host_link_bandwidth=4e10,
    host_link_latency_s=1e-5,
    compute_efficiency=0.5,
    bandwidth_efficiency=0.5,
    iteration_floor_s=1e-3,
    source="made up",
)


def make(model: ModelSpec = MODEL, device: DeviceSpec = DEVICE) -> CostModel:
    return CostModel(model, device, EDGES)


def test_a_long_prefill_costs_its_arithmetic() -> None:
    n = 4000
    flops = n * 10e9 + 1e9 + n * (n + 1) / 2 * 4 * 10 * 1000
    assert make().prefill_s(n) == pytest.approx(1e-3 + flops / 1e14)


def test_a_device_that_packs_weights_does_so_once_for_each_pass_that_prefills() -> None:
    plain, packing = make(), make(device=replace(DEVICE, prefill_weight_reads=2.0))
    packed_s = 2.0 * MODEL.weight_bytes / 1e12
    assert packing.prefill_s(4000) == pytest.approx(plain.prefill_s(4000) + packed_s)
    for prefills in (((4000, 0),), ((4000, 0), (300, 50))):
        expected = plain.iteration_s(prefills, 900, 3) + packed_s
        assert packing.iteration_s(prefills, 900, 3) == pytest.approx(expected)
        assert packing.roofline_s(prefills, 900, 3) == pytest.approx(
            plain.roofline_s(prefills, 900, 3) + packed_s
        )
    assert packing.iteration_s((), 900, 3) == plain.iteration_s((), 900, 3)
    assert packing.marginal_prefill_s(4000) == plain.marginal_prefill_s(4000)
    with pytest.raises(ConfigError, match="prefill_weight_reads"):
        replace(DEVICE, prefill_weight_reads=-1.0)


def test_what_is_read_again_comes_on_top_of_the_roofline() -> None:
    plain = make()
    again = make(
        device=replace(DEVICE, decode_weight_reads=0.5, decode_kv_reads=3.0, prefill_kv_reads=5.0)
    )
    weights_s, kv_s = MODEL.weight_bytes / 1e12, MODEL.kv_bytes_per_token / 1e12
    decode_s = 8 * 0.5 * weights_s + 2.0 * (900 - 300) * kv_s
    assert again.iteration_s((), 900, 8, 300) == pytest.approx(
        plain.iteration_s((), 900, 8, 300) + decode_s
    )
    prefill_s = 4.0 * (50 + 1000) * kv_s
    prefills = ((4000, 50), (16, 1000))
    for ask in (CostModel.iteration_s, CostModel.roofline_s):
        expected = ask(plain, prefills, 900, 8, 300) + decode_s + prefill_s
        assert ask(again, prefills, 900, 8, 300) == pytest.approx(expected)
    assert again.prefill_s(16, 1000) == pytest.approx(plain.prefill_s(16, 1000) + 4000 * kv_s)
    more_s = again.marginal_prefill_s(16, 1000) - plain.marginal_prefill_s(16, 1000)
    assert more_s == pytest.approx(4000 * kv_s)
    assert again.prefill_s(4000) == plain.prefill_s(4000)
    for field in ("decode_kv_reads", "prefill_kv_reads"):
        with pytest.raises(ConfigError, match=f"{field} .* must be at least 1, not 0.5"):
            replace(DEVICE, **{field: 0.5})


def test_a_short_prefill_and_a_decode_step_cost_the_weights() -> None:
    model = make()
    assert model.prefill_s(1) == pytest.approx(1e-3 + (10e9 + 2e6) / 1e12)
    # 8 requests: weights, 8 x 1000 tokens of context, and 8 new ones.
    expected = 1e-3 + (10e9 + 8008e6) / 1e12
    assert model.iteration_s([], 8000, 8) == pytest.approx(expected)


def test_shared_tokens_are_read_once() -> None:
    model = make()
    saved = model.iteration_s([], 8000, 8) - model.iteration_s(
        [], 8000, 8, shared_tokens_saved=7000
    )
    assert saved == pytest.approx(7000e6 / 1e12)


def test_nothing_to_do_takes_no_time() -> None:
    model = make()
    assert model.prefill_s(0, 500) == 0
    assert model.iteration_s([], 0, 0) == 0
    assert model.load_s(Tier.HOST, Tier.DEVICE, 0) == 0


def test_deep_tokens_cost_more_and_cached_ones_less() -> None:
    model = make(find_model("Llama-3.1-8B"), find_device("H100-80"))
    assert model.prefill_s(1000, 30_000) > model.prefill_s(1000, 0)
    assert model.prefill_s(1000, 30_000) < model.prefill_s(31_000)
    assert model.marginal_prefill_s(1000) < model.prefill_s(1000)


def test_a_mixture_of_experts_reads_more_weights_the_more_tokens_there_are() -> None:
    dense = find_model("DeepSeek-V2-Lite")
    model = make(dense, find_device("H100-80"))
    one, many = model.iteration_s([], 0, 1), model.iteration_s([], 0, 64)
    whole = dense.weight_bytes / (3.35e12 * 0.8)
    assert one - 1e-3 < 0.3 * whole
    assert whole * 0.9 < many - 1e-3 < whole * 1.3


def test_a_load_through_two_edges_runs_at_the_pace_of_the_narrower() -> None:
    model = make()
    assert model.load_s(Tier.DISK, Tier.DEVICE, 4 * 10**9) == pytest.approx(1.1e-4 + 1.0)
    assert model.load_s(Tier.HOST, Tier.DEVICE, 10**9, queued_bytes=10**9) == pytest.approx(
        1e-5 + 2 / 40
    )


def test_an_unknown_edge_is_named() -> None:
    with pytest.raises(ConfigError, match="STORE to HOST"):
        make().load_s(Tier.STORE, Tier.DEVICE, 1)


@pytest.mark.parametrize(("bandwidth", "latency_s"), [(0, 0), (-1, 0), (1, -1)])
def test_an_edge_without_bandwidth_is_refused(bandwidth: float, latency_s: float) -> None:
    with pytest.raises(ConfigError, match="positive bandwidth"):
        EdgeCost(bandwidth, latency_s)


def test_corrections_scale_the_roofline_and_replace_the_fixed_part() -> None:
    model = make()
    prefill, decode = model.prefill_s(4000), model.iteration_s([], 8000, 8)
    model.correct(prefill=Correction(fixed_s=0.5, scale=2.0))
    assert model.prefill_s(4000) == pytest.approx(0.5 + 2 * (prefill - 1e-3))
    assert model.iteration_s([], 8000, 8) == decode
    model.correct_edge(Tier.HOST, Tier.DEVICE, bandwidth=1e9)
    assert model.load_s(Tier.HOST, Tier.DEVICE, 10**9) == pytest.approx(1 + 1e-5)


def test_one_chunk_alone_is_a_prefill_and_a_mixed_pass_lies_between_its_parts() -> None:
    model = make()
    model.correct(prefill=Correction(1e-3, 2.0), decode=Correction(1e-3, 1.0))
    assert model.iteration_s([(4000, 500)], 0, 0) == pytest.approx(model.prefill_s(4000, 500))
    mixed = model.iteration_s([(4000, 500)], 8000, 8)
    roofline = model.roofline_s([(4000, 500)], 8000, 8)
    assert 1e-3 + roofline < mixed < 1e-3 + 2 * roofline


def test_a_faster_device_is_never_slower() -> None:
    fast = replace(DEVICE, flops=2 * DEVICE.flops, memory_bandwidth=2 * DEVICE.memory_bandwidth)
    for case in ([(1, 0)], 0, 0), ([(4000, 500)], 100, 3), ([], 10**6, 64):
        assert make(device=fast).iteration_s(*case) < make().iteration_s(*case)
