"""Measurements of a server as the simulator reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tiered_kv.core.device_spec import find_device
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import EdgeCost
from tiered_kv.scheduler.measured_costs import PassTimes
from tiered_kv.simulation.measured_server import MeasuredServer, read_measured_server
from tiered_kv.simulation.settings import CacheSettings, DiskSpec, InstanceSettings

TIMES = PassTimes(
    prefill_fixed_s=0.1,
    prefill_request_s=0.01,
    prefill_token_s=0.003,
    prefill_pair_s=0.0,
    prefill_cached_s=0.0,
    decode_fixed_s=0.05,
    decode_request_s=0.0,
    decode_context_s=0.0,
)
MEASURED = MeasuredServer(
    host="a machine",
    model="SmolLM2-135M",
    element_bytes=4,
    times=TIMES,
    request_overhead_s=0.02,
    host_link=EdgeCost(4e9, 1e-3),
    disk=DiskSpec(read_bandwidth=1e9, write_bandwidth=5e8, latency_s=1e-3),
)
SETTINGS = InstanceSettings(
    model=find_model("Llama-3.1-8B"),
    device=find_device("CPU-2"),
    cache=CacheSettings(device_bytes=10**9, host_bytes=10**9, disk_bytes=10**9),
    policy="lpm",
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(MEASURED.to_json()))
    assert read_measured_server(path) == MEASURED


def test_a_simulation_takes_model_passes_and_links_from_it() -> None:
    settings = MEASURED.applied_to(SETTINGS)
    costs = settings.costs()
    assert settings.policy == "lpm"
    assert settings.device.name == "a machine"
    assert settings.model.kv_bytes_per_token == 30 * 2 * 3 * 64 * 4
    assert costs.prefill_s(100) == pytest.approx(0.1 + 0.01 + 0.3)
    assert costs.edge(Tier.HOST, Tier.DEVICE) == MEASURED.host_link
    assert costs.edge(Tier.DISK, Tier.HOST) == EdgeCost(1e9, 1e-3)
    assert costs.edge(Tier.HOST, Tier.DISK) == EdgeCost(5e8, 1e-3)


def test_the_size_of_the_pool_must_be_given() -> None:
    with pytest.raises(ConfigError, match="--device-kv"):
        MEASURED.applied_to(replace(SETTINGS, cache=CacheSettings()))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "schema None"),
        ("[1]", "no measurements"),
        ("{", "can't be read"),
        ('{"schema": 1, "host": "x"}', "no measurements of a server"),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_measured_server(path)
