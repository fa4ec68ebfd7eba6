"""Device presets, groups of devices, and values that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tiered_kv.core.device_spec import DEVICES, TENSOR_PARALLEL_EFFICIENCY, find_device, preset_for
from tiered_kv.core.errors import ConfigError


def test_a_group_adds_up_but_works_less_efficiently() -> None:
    one = DEVICES["H100-80"]
    four = find_device("4xh100-80")
    assert four.memory_bytes == 4 * one.memory_bytes
    assert four.flops == 4 * one.flops
    assert four.host_link_bandwidth == 4 * one.host_link_bandwidth
    assert four.compute_efficiency == one.compute_efficiency * TENSOR_PARALLEL_EFFICIENCY
    assert four.iteration_floor_s == one.iteration_floor_s
    assert one.scaled(1) is one


def test_presets_have_sources_and_find_themselves() -> None:
    for name, preset in DEVICES.items():
        assert preset.name == name
        assert preset.source
        assert find_device(name) is preset


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"A10.*H100-80"):
        find_device("B9000")


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bytes": 0},
        {"flops": float("nan")},
        {"compute_efficiency": 1.5},
        {"bandwidth_efficiency": 0.0},
        {"iteration_floor_s": -1.0},
    ],
)
def test_impossible_values_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(DEVICES["A10"], **change)


def test_a_group_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        DEVICES["A10"].scaled(0)


@pytest.mark.parametrize(
    ("torch_says", "preset"),
    [
        ("NVIDIA H200", "H200-141"),
        ("NVIDIA GH200 144G HBM3e", "H200-141"),
        ("NVIDIA H100 80GB HBM3", "H100-80"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40S"),
        ("NVIDIA A10G", "A10"),
        # As fast as three A10s: half a name is no likeness.
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_nearest_preset_goes_by_whole_words(torch_says: str, preset: str | None) -> None:
    assert preset_for(torch_says) is (DEVICES[preset] if preset else None)
