"""`--tiered-kv-host-format` and `--tiered-kv-disk-format`: what is accepted, and what is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from sgl_kernel_ext.formats import Format
from tiered_kv.core.config import PAGE_FORMATS, DiskConfig, HostConfig, TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache import build
from tiered_kv.plugin.cache.device_pool import buffers_of
from tiered_kv.plugin.cache.formats import TierFormats, tier_formats
from tiered_kv.plugin.options import values as option_values
from tiered_kv.tiers.device import CpuPageCopier, buffer_format
from tiered_kv.tiers.encoded_copier import EncodedCpuPageCopier
from tiered_kv.tiers.encoded_store import EncodedDisk
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.in_memory import InMemoryStore

PAGE_SIZE = 16


def config(host: str = "raw", disk: str = "same") -> TieredKVConfig:
    return TieredKVConfig(
        page_size=PAGE_SIZE,
        host=HostConfig(page_format=host),
        disk=DiskConfig(directory=Path("/kv"), page_format=disk),
    )


def mha(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Any:
    return MHATokenToKVPool(
        size=64,
        page_size=PAGE_SIZE,
        dtype=dtype,
        head_num=3,
        head_dim=head_dim,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )


def mla() -> Any:
    return MLATokenToKVPool(
        size=64,
        page_size=PAGE_SIZE,
        dtype=torch.bfloat16,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )


def formats(host: str = "raw", disk: str = "same", pool: Any = None) -> TierFormats:
    return tier_formats(config(host, disk), buffers_of(pool if pool is not None else mha()))


# -- options ---------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_formats() -> None:
    assert set(PAGE_FORMATS) == {f.value for f in Format}


def test_values() -> None:
    assert option_values.host_format("--x", None) == "raw"
    assert option_values.host_format("--x", " FP8 ") == "fp8"
    assert option_values.disk_format("--x", None) == "same"
    assert option_values.disk_format("--x", "kitty") == "kitty"
    with pytest.raises(ConfigError, match=r"--x must be one of raw, fp8, .*, not 'int3'"):
        option_values.host_format("--x", "int3")
    with pytest.raises(ConfigError, match=r"--x must be one of same, raw, .*, not 'zip'"):
        option_values.disk_format("--x", "zip")


@pytest.mark.parametrize("host", PAGE_FORMATS)
@pytest.mark.parametrize("disk", PAGE_FORMATS)
def test_the_disk_may_not_keep_more_than_passes_through_the_host(host: str, disk: str) -> None:
    if PAGE_FORMATS.index(disk) >= PAGE_FORMATS.index(host):
        assert config(host, disk).disk_page_format == disk
        return
    with pytest.raises(ConfigError, match=f"cannot keep pages in {disk} if the host tier keeps"):
        config(host, disk)


def test_the_disk_follows_the_host() -> None:
    assert config("int4").disk_page_format == "int4"
    assert config().disk_page_format == "raw"


def test_a_format_for_a_disk_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="given the format fp8 but no directory"):
        DiskConfig(page_format="fp8")


# -- pools -----------------------------------------------------------------------------------------


def test_raw_pages_are_what_they_were_before_there_were_formats() -> None:
    """Their fingerprint names directories that are full of them."""
    device = buffers_of(mha())
    own = buffer_format(PAGE_SIZE, device.layers, device.buffers)
    raw = formats()
    assert raw.device == raw.host == raw.disk == own
    beside_lossy = formats("raw", "fp8")
    assert beside_lossy.host.fingerprint() == own.fingerprint()


@pytest.mark.parametrize("pool", [mha(), mla(), mha(torch.float32, head_dim=80)])
@pytest.mark.parametrize("name", PAGE_FORMATS[1:])
def test_pages_of_each_pool_shrink(pool: Any, name: str) -> None:
    found = formats(name, pool=pool)
    assert found.host == found.disk
    assert found.host.page_bytes < 0.6 * found.device.page_bytes
    assert found.host.n_layers == found.device.n_layers == 2


def test_only_the_disk_shrinks() -> None:
    found = formats("raw", "int4")
    assert found.host == found.device
    assert found.disk.page_bytes < found.host.page_bytes
    assert not found.host.is_lossy
    assert found.disk.is_lossy


@pytest.mark.parametrize(("host", "disk"), [("fp8", "same"), ("raw", "int4")])
def test_a_quantised_kv_cache_is_refused_in_a_sentence(host: str, disk: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used with this model: .* use raw\.$"):
        formats(host, disk, mha(torch.float8_e4m3fn))


def test_a_quantised_kv_cache_is_fine_with_raw_pages() -> None:
    assert not formats(pool=mha(torch.float8_e4m3fn)).host.is_lossy


# -- what is built of them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "disk", "kind"),
    [
        ("raw", "same", CpuPageCopier),
        ("raw", "fp8", CpuPageCopier),
        ("fp8", "same", EncodedCpuPageCopier),
    ],
)
def test_the_copier_of_the_hosts_format(host: str, disk: str, kind: type) -> None:
    pool = mha()
    found = formats(host, disk, pool)
    copier = build.make_copier(found, buffers_of(pool), HostPool(found.host, 1 << 20))
    assert type(copier) is kind
    assert copier.page_format == found.host


@pytest.mark.parametrize(
    ("host", "disk", "converts"),
    [("raw", "same", False), ("fp8", "fp8", False), ("raw", "int4", True), ("fp8", "int2", True)],
)
def test_the_disk_converts_if_it_must(host: str, disk: str, converts: bool) -> None:
    found = formats(host, disk)
    pages = InMemoryStore().namespace(b"n", found.disk.page_bytes)
    assert isinstance(found.on_disk(pages), EncodedDisk) is converts


def test_every_format_on_disk_has_a_name_of_its_own() -> None:
    def name(host: str, disk: str) -> bytes:
        return formats(host, disk).disk.fingerprint()

    names = {}
    for host, disk in [("raw", "raw"), ("raw", "fp8"), ("fp8", "same"), ("raw", "int4")]:
        names[host, disk] = name(host, disk)
    assert len(set(names.values())) == 3
    # The same bytes on disk, whatever the host made of them on the way.
    assert names["raw", "fp8"] == names["fp8", "same"]
