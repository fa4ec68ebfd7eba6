"""Sizing of the host tier, and the buffers of the engine's KV pools."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from tiered_kv.core.config import HostConfig, TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache import host
from tiered_kv.plugin.cache.device_pool import EngineAllocator, buffers_of
from tiered_kv.plugin.cache.parts import RankMinimum
from tiered_kv.tiers import host_memory
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.host_size import RESERVE_BYTES
from tiered_kv.tiers.kv_shard import KVShard, kv_shard
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.transfer import SingleRank

GB = 10**9


FORMAT = PageFormat.of_buffers(16, [0, 0], [1024, 1024])


@pytest.fixture(autouse=True)
def twelve_gb_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 12 * GB + RESERVE_BYTES)


def host_bytes(device_bytes: int, n_ranks: int = 1, **options: object) -> int:
    config = TieredKVConfig(host=HostConfig(**options))  # type: ignore[arg-type]
    return host.host_bytes(config, device_bytes, FORMAT, n_ranks, SingleRank())


def test_the_size_is_the_one_given_or_a_multiple_of_the_device_pool() -> None:
    assert host_bytes(5 * GB, size_bytes=3 * GB) == 3 * GB
    assert host_bytes(4 * GB, ratio=1.5) == 6 * GB


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_size_that_the_machine_does_not_have_is_refused_in_a_sentence(n_ranks: int) -> None:
    per_rank = 12 * GB // n_ranks
    assert host_bytes(1, n_ranks, size_bytes=per_rank) == per_rank
    with pytest.raises(ConfigError, match=r"lower --tiered-kv-host-size"):
        host_bytes(1, n_ranks, size_bytes=per_rank + 1)


def test_a_multiple_that_the_machine_does_not_have_is_cut_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    free = 12 * GB + RESERVE_BYTES
    assert host_bytes(100 * GB, n_ranks=2) == int(0.8 * free) // 2
    assert "takes 5.23 GB per rank instead of 200.00 GB, 2 times" in caplog.text
    assert "13.07 GB of memory are free for 2 of them" in caplog.text


def test_all_ranks_go_by_what_the_one_sees_that_has_least() -> None:
    class OthersSeeLess:
        def minimum(self, values: list[int]) -> list[int]:
            return [min(value, 5 * GB) for value in values]

    config = TieredKVConfig(host=HostConfig())
    taken = host.host_bytes(config, 100 * GB, FORMAT, 1, OthersSeeLess())
    assert taken == 5 * GB - RESERVE_BYTES


def test_a_machine_that_does_not_say_what_it_has_is_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: None)
    assert host_bytes(1, size_bytes=99 * GB) == 99 * GB


def test_memory_is_there_before_it_is_pinned_and_near_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[object, ...]] = []
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    status = [0]

    def register(address: int, n_bytes: int, flags: int) -> int:
        calls.append(("register", address, n_bytes, flags))
        return status[0]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: gpu}.__getitem__)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(host_memory, "numa_node_of", {"0000:1b:00.0": 1}.__getitem__)
    monkeypatch.setattr(host_memory, "prepare", lambda *args: calls.append(("prepare", *args)))
    host.register_for_dma(4096, 8192)
    assert calls == [("prepare", 4096, 8192, 1), ("register", 4096, 8192, 0)]
    status[0] = 2
    with pytest.raises(ConfigError, match=r"cannot be pinned \(CUDA error 2\)"):
        host.register_for_dma(4096, 8192)

    def no_memory(*args: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(host_memory, "prepare", no_memory)
    with pytest.raises(ConfigError, match="are not there"):
        host.register_for_dma(4096, 8192)


def make_mha() -> MHATokenToKVPool:
    return MHATokenToKVPool(
        size=32,
        page_size=16,
        dtype=torch.float32,
        head_num=2,
        head_dim=8,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
    )


def test_an_mha_pool_gives_k_and_v_of_each_layer_in_turn() -> None:
    pool = make_mha()
    device = buffers_of(pool)
    assert device.layers == (0, 0, 1, 1, 2, 2)
    assert device.buffers[2] is pool.k_buffer[1]
    assert device.buffers[3] is pool.v_buffer[1]
    assert device.n_bytes == 6 * 48 * 2 * 8 * 4


def test_an_mla_pool_gives_one_buffer_per_layer() -> None:
    pool = MLATokenToKVPool(
        size=32,
        page_size=16,
        dtype=torch.float32,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
    )
    device = buffers_of(pool)
    assert device.layers == (0, 1)
    assert [buffer[0].numel() for buffer in device.buffers] == [12, 12]


def test_layouts_that_are_not_rows_of_bytes_are_refused() -> None:
    pool = make_mha()
    pool.kv_cache_layout = "hnd"
    with pytest.raises(ConfigError, match="hnd layout"):
        buffers_of(pool)
    with pytest.raises(ConfigError, match="SimpleNamespace"):
        buffers_of(SimpleNamespace())


def test_the_allocator_frees_whole_pages() -> None:
    from tiered_kv.plugin.upstream.v0_5_17.cpu_allocator import CpuPagedTokenToKVPoolAllocator

    allocator = EngineAllocator(
        CpuPagedTokenToKVPoolAllocator(
            size=64, page_size=16, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
        )
    )
    slots = allocator.alloc(32)
    assert slots is not None
    assert allocator.available() == 32
    assert allocator.alloc(64) is None
    allocator.free(slots)
    assert allocator.available() == 64


def test_ranks_gather_what_each_of_them_gave() -> None:
    given = [bytes(range(32)), bytes(range(100, 132))]
    gathered = on_two_ranks(lambda rank, group: RankMinimum(group).gather(given[rank]))
    assert gathered == [given, given]


def on_two_ranks(call: Callable[[int, Any], Any]) -> list[Any]:
    """Two ranks of gloo in one process: a group needs a store in common, not a process each."""
    store = torch.distributed.HashStore()
    returned: list[Any] = [None, None]

    def rank(index: int) -> None:
        group = torch.distributed.ProcessGroupGloo(store, index, 2, timedelta(seconds=30))
        returned[index] = call(index, group)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return returned


PAGE = PageFormat.of_buffers(4, [0, 1], [100, 100])


def test_ranks_with_the_same_kv_put_their_host_memory_together() -> None:
    def open_it(rank: int, group: Any) -> tuple[HostPool, KVShard]:
        shard = kv_shard(rank, 2, None)
        return host.open_host(PAGE, 10 * PAGE.slot_bytes, shard, RankMinimum(group), pins=False)

    (one, kept), (other, _) = on_two_ranks(open_it)
    assert (one.n_pages, other.n_pages) == (20, 20)
    assert one.is_shared
    assert kept == kv_shard(0, 2, None)
    one.pages[19] = 7
    assert (other.pages[19] == 7).all()
    assert (other.pages[18] == 0).all()


def test_ranks_that_can_share_no_memory_keep_their_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host, "share_memory", lambda *_: None)

    def open_it(rank: int, group: Any) -> tuple[HostPool, KVShard]:
        shard = kv_shard(rank, 2, None)
        return host.open_host(PAGE, 10 * PAGE.slot_bytes, shard, RankMinimum(group), pins=False)

    opened = on_two_ranks(open_it)
    assert [(pool.n_pages, pool.is_shared) for pool, _ in opened] == [(10, False)] * 2
    assert [shard for _, shard in opened] == [kv_shard(rank, 2, None).apart() for rank in range(2)]
    assert "each keeps a copy of its own" in caplog.text


def test_a_rank_whose_kv_no_other_has_shares_nothing() -> None:
    pool, shard = host.open_host(
        PAGE, 10 * PAGE.slot_bytes, KVShard.alone(0, 1), SingleRank(), pins=False
    )
    assert (pool.n_pages, pool.is_shared, shard) == (10, False, KVShard.alone(0, 1))


def test_what_sglang_writes_into_a_configuration_is_no_window() -> None:
    from tiered_kv.plugin.cache.costs import _as_published

    assert _as_published({"swa_head_dim": 64, "a": 1}, 64) == {"a": 1}
    assert _as_published({"swa_head_dim": 128}, 64) == {"swa_head_dim": 128}
    assert _as_published({"text_config": {"swa_head_dim": 64}}, 64) == {"text_config": {}}
