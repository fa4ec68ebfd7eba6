"""tiered_kv.preset finds the device back from times that its own cost model predicts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiered_kv import preset
from tiered_kv.core import device_spec
from tiered_kv.core.device_spec import DeviceSpec, find_device
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel

H200 = find_device("H200-141")
TRUE = replace(
    H200,
    compute_efficiency=0.42,
    bandwidth_efficiency=0.71,
    host_link_bandwidth=48e9,
    host_link_latency_s=30e-6,
)
OVERHEAD_S = 4e-3
TOKEN_BYTES = 131072


def copies_of(device: DeviceSpec) -> dict[str, Any]:
    rows = [
        {
            "mover": mover,
            "direction": "to device",
            "n_bytes": tokens * TOKEN_BYTES,
            "seconds": factor
            * (device.host_link_latency_s + tokens * TOKEN_BYTES / device.host_link_bandwidth),
        }
        for mover, factor in (("memcpy", 0.9), ("ours, dma", 1.2), ("ours, kernel", 1.0))
        for tokens in (1024, 4096, 16384)
    ]
    return {"rows": rows}


def serving_of(device: DeviceSpec) -> dict[str, Any]:
    """First tokens carry what HTTP adds; passes have no floor but the one that stays assumed."""
    model = find_model(preset.MODEL)
    cost = CostModel(model, device, {})
    samples = [
        {
            "system": system,
            "state": "new",
            "tokens": tokens,
            "cached_tokens": 0,
            "ttft_s": OVERHEAD_S + cost.prefill_s(tokens) * (1 if system == "plain" else 3),
        }
        for system in ("plain", "tiered")
        for tokens in (2048, 8192, 32768, 65536)
    ]
    cached = {**samples[0], "cached_tokens": 2000, "ttft_s": 0.001}
    tpot_s = cost.iteration_s((), 8 * 2112, 8)
    decoding = {"plain": {"tpot_s": tpot_s, "n_decodes": 8, "context_tokens": 2112}}
    return {"samples": [*samples, cached], "decoding": decoding}


def test_the_device_is_found_back() -> None:
    parts = {"copies": copies_of(TRUE), "ttft_plain": serving_of(TRUE)}
    found = preset.measured_preset(parts, H200)
    assert found.compute_efficiency == pytest.approx(0.42, rel=0.01)
    assert found.bandwidth_efficiency == pytest.approx(0.71, rel=0.01)
    assert found.host_link_bandwidth == pytest.approx(48e9, rel=0.01)
    assert found.host_link_latency_s == pytest.approx(30e-6, rel=0.01)
    assert replace(found, **{f: getattr(H200, f) for f in CHANGED}) == H200


CHANGED = (
    "compute_efficiency", "bandwidth_efficiency", "host_link_bandwidth", "host_link_latency_s",
    "source",
)  # fmt: skip


def test_what_was_not_measured_stays_and_is_said_to_be_assumed() -> None:
    found = preset.measured_preset({"copies": copies_of(TRUE)}, H200)
    assert found.compute_efficiency == H200.compute_efficiency
    assert "compute efficiency" in found.source
    assert "host link" not in found.source
    with pytest.raises(ConfigError, match="Neither copies nor ttft_plain"):
        preset.measured_preset({"environment": {}}, H200)


def test_figures_that_no_such_device_can_reach_are_refused() -> None:
    with pytest.raises(ConfigError, match="of the peak of A10"):
        preset.measured_preset({"ttft_plain": serving_of(TRUE)}, find_device("A10"))


def test_a_line_over_relative_errors() -> None:
    line = preset.fit_line([(1.0, 3.0), (10.0, 21.0), (100.0, 201.0)])
    assert (line.fixed_s, line.slope) == pytest.approx((1.0, 2.0))
    assert preset.fit_line([(1.0, 1.0), (2.0, 3.0)]).fixed_s == 0.0
    with pytest.raises(ConfigError, match="take no longer"):
        preset.fit_line([(1.0, 2.0), (2.0, 1.0)])
    with pytest.raises(ConfigError, match="two sizes"):
        preset.fit_line([(1.0, 2.0), (1.0, 2.1)])


def test_the_preset_takes_the_place_of_the_assumed_one() -> None:
    parts = {"copies": copies_of(TRUE), "ttft_plain": serving_of(TRUE)}
    found = preset.measured_preset(parts, H200)
    before = Path(device_spec.__file__).read_text()
    after = preset.with_preset(before, found)
    module: dict[str, Any] = {"__name__": "tiered_kv.core.device_spec"}
    exec(compile(after, "device_spec.py", "exec", dont_inherit=True), module)
    presets = module["DEVICES"]
    assert presets["H200-141"].compute_efficiency == found.compute_efficiency
    assert presets["H200-141"].source == found.source
    assert list(presets) == list(device_spec.DEVICES)
    assert all(len(line) <= 100 for line in after.splitlines())
    # Everything else is as it was, and writing twice changes nothing.
    assert preset.with_preset(after, found) == after
    assert preset.with_preset(after, H200).count("\n") == before.count("\n")
    with pytest.raises(ConfigError, match="no preset B200"):
        preset.with_preset(before, replace(found, name="B200"))


def write(folder: Path, part: str, result: dict[str, Any], **changes: Any) -> None:
    document = {"schema": 2, "step": part, "device": "NVIDIA H200", "is_small": False}
    document |= {"state": "done", "result": result, **changes}
    (folder / f"{part}.json").write_text(json.dumps(document))


def test_the_command_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "copies", copies_of(TRUE))
    write(tmp_path, "ttft_plain", serving_of(TRUE))
    out = tmp_path / "out" / "preset.json"
    out.parent.mkdir()
    assert preset.main([str(tmp_path), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["host_link_bandwidth"] == pytest.approx(48e9, rel=0.01)
    printed = capsys.readouterr().out
    assert "compute_efficiency" in printed
    assert "memory_bandwidth" not in printed


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"is_small": True}, "--rehearse"),
        ({"schema": 1}, "schema 1"),
        ({"device": "NVIDIA Unknown"}, "name the one whose peaks it has"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], text: str
) -> None:
    write(tmp_path, "copies", copies_of(TRUE), **changes)
    assert preset.main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


def test_figures_of_two_devices_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "copies", copies_of(TRUE))
    write(tmp_path, "ttft_plain", serving_of(TRUE), device="NVIDIA A10")
    with pytest.raises(ConfigError, match="keep one device's"):
        preset.read_parts(tmp_path)
    with pytest.raises(ConfigError, match="holds no files"):
        preset.read_parts(tmp_path / "nowhere")


def test_what_is_not_done_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, "copies", copies_of(TRUE))
    write(tmp_path, "ttft_plain", {"samples": []}, state="out of time")
    (tmp_path / "check.json").write_text("{}")
    _, parts = preset.read_parts(tmp_path)
    assert list(parts) == ["copies"]


def test_samples_of_several_steps_count_together() -> None:
    whole = serving_of(TRUE)
    parts = {
        "copies": copies_of(TRUE),
        "ttft_plain": {**whole, "samples": whole["samples"][:2]},
        "ttft_more": {"samples": whole["samples"][2:], "decoding": {}},
    }
    expected = preset.measured_preset({**parts, "ttft_plain": whole, "ttft_more": whole}, H200)
    assert preset.measured_preset(parts, H200).compute_efficiency == pytest.approx(
        expected.compute_efficiency
    )


@pytest.mark.parametrize(
    ("mixed", "gains"), [((0.01, 0.5), True), ((0.03, 0.5), False), ((0.01, 0.9), False)]
)
def test_mixing_is_the_default_where_it_was_better(mixed: tuple[float, float], gains: bool) -> None:
    def row(mode: str, tpot_s: float, ttft_s: float) -> dict[str, Any]:
        return {"mode": mode, "tpot_s": tpot_s, "ttft_s": ttft_s}

    rows = [row("in turns", 0.02, 0.5), row("mixed", *mixed)]
    found = preset.measured_preset({"mixing": {"rows": rows}}, H200)
    assert (found.is_mixing_measured, found.mixes_decodes) == (True, gains)
    assert not H200.is_mixing_measured
    with pytest.raises(ConfigError, match="Only one way"):
        preset.mixing_gains({"rows": rows[:1]})
