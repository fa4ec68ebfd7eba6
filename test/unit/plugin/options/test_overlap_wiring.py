"""What the options of overlap make of a cache: who is told of passes, and which copier is built."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support_tiers.stream_double import Device, Eager
from tiered_kv.core.config import HostConfig, TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache import build, device_copier
from tiered_kv.plugin.cache.device_pool import DeviceBuffers
from tiered_kv.plugin.cache.formats import TierFormats, tier_formats
from tiered_kv.tiers import copy_paths
from tiered_kv.tiers.bus_paths import DmaPath, KernelPath
from tiered_kv.tiers.copy_paths import CopySeconds
from tiered_kv.tiers.device import CpuPageCopier
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.stream_copier import StreamPageCopier
from tiered_kv.tiers.timeline import read_events

PAGE_SIZE = 4


def pools(host_format: str = "raw") -> tuple[TierFormats, DeviceBuffers, HostPool]:
    buffers = tuple(torch.zeros(20 * PAGE_SIZE, 2, 16, dtype=torch.float16) for _ in range(4))
    device = DeviceBuffers((0, 0, 1, 1), buffers, (True, False) * 2)
    config = TieredKVConfig(page_size=PAGE_SIZE, host=HostConfig(page_format=host_format))
    formats = tier_formats(config, device)
    return formats, device, HostPool(formats.host, 16 * formats.host.slot_bytes)


def copier_of(host_format: str = "raw", copy_path: str = "auto") -> StreamPageCopier:
    """As for an accelerator."""
    streams = Device(Eager()).copy_streams
    return device_copier.make_stream_copier(*pools(host_format), streams, copy_path)


@pytest.mark.parametrize("host_format", ["raw", "fp8"])
@pytest.mark.parametrize(
    ("kernel", "down", "up"),
    [
        (CopySeconds(0.1, 0.1), KernelPath, KernelPath),
        (CopySeconds(0.1, 9.0), KernelPath, DmaPath),
        (CopySeconds(9.0, 0.1), DmaPath, KernelPath),
        (CopySeconds(9.0, 9.0), DmaPath, DmaPath),
    ],
)
def test_each_direction_takes_the_path_that_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    host_format: str,
    kernel: CopySeconds,
    down: type,
    up: type,
) -> None:
    real = copy_paths.measure

    def measure(*args: Any) -> dict[str, CopySeconds]:
        measured = real(*args)
        assert set(measured) == {"dma", "kernel"}
        return {"dma": CopySeconds(1.0, 1.0), "kernel": kernel}

    monkeypatch.setattr(copy_paths, "measure", measure)
    caplog.set_level(logging.INFO)
    formats, device, host = pools(host_format)
    streams = Device(Eager()).copy_streams
    copier = device_copier.make_stream_copier(formats, device, host, streams)
    assert (type(copier.down), type(copier.up)) == (down, up)
    assert copier.page_format == formats.host
    assert all(not buffer.any() for buffer in device.buffers)
    (line,) = [r.getMessage() for r in caplog.records if "GB/s" in r.getMessage()]
    assert "to the host by" in line


@pytest.mark.parametrize(("name", "path"), [("dma", DmaPath), ("kernel", KernelPath)])
def test_the_path_that_was_named_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, path: type
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(copy_paths, "measure", None)
    copier = copier_of(copy_path=name)
    assert (type(copier.down), type(copier.up)) == (path, path)
    if path is DmaPath:
        assert copier.down is not copier.up, "each direction has a block of its own"
    assert f"copies keep {64 if path is DmaPath else 0} MiB of device memory" in caplog.text


def test_where_kernels_do_not_run_it_is_dma(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(device_copier, "warm_up", broken)
    copier = copier_of()
    assert (type(copier.down), type(copier.up)) == (DmaPath, DmaPath)
    assert "copied by DMA; kernels cannot (no compiler)" in caplog.text
    with pytest.raises(ConfigError, match="kernels do not run here"):
        copier_of(copy_path="kernel")


def test_a_cpu_has_one_path() -> None:
    formats, device, host = pools()
    assert type(device_copier.make_copier(formats, device, host)) is CpuPageCopier
    with pytest.raises(ConfigError, match="--tiered-kv-copy-path dma is for GPUs"):
        device_copier.make_copier(formats, device, host, "dma")


def test_nobody_asks_for_passes_by_default() -> None:
    context: Any = SimpleNamespace(timeline=None, pacer=build.make_pacer(None))
    assert build.make_pass_log(context, None, synchronous=True) is None
    context.pacer = build.make_pacer(0.03)
    assert build.make_pass_log(context, None, synchronous=True) is not None
    assert context.pacer.bytes_per_s < float("inf")


def test_a_timeline_wants_timed_copies(tmp_path: Path) -> None:
    copier = copier_of(copy_path="dma")
    args = SimpleNamespace(tiered_kv_trace_file=None)
    assert build.open_timeline(args, 0, copier) is None
    assert not copier.timed
    args.tiered_kv_trace_file = str(tmp_path / "trace.json")
    timeline = build.open_timeline(args, 1, copier)
    assert timeline is not None
    assert copier.timed
    context: Any = SimpleNamespace(timeline=timeline, pacer=build.make_pacer(None))
    assert build.make_pass_log(context, None, synchronous=True) is not None
    timeline.close()
    assert read_events(tmp_path / "trace-rank1.json")
