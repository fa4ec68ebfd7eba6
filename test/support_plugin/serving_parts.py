"""The tiers over SGLang's pool, for a scheduler in a test: device, host, and a disk in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support_tiers.doubles import Faults, FaultyDisk
from tiered_kv.core.config import MemoryConfig
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.plugin.cache.device_pool import DeviceBuffers, EngineAllocator, buffers_of
from tiered_kv.plugin.cache.events import KvEvents
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
from tiered_kv.plugin.cache.parts import CacheParts, HostReport
from tiered_kv.plugin.cache.residency_log import ResidencyLog
from tiered_kv.plugin.passes.step_times import StepTimes
from tiered_kv.tiers.cold.local_pages import LocalStore
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import CpuPageCopier, buffer_format
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.page_store import PageStore


class PretendDisk:
    """A disk tier in memory, for all namespaces; its reads and writes can be held back, or fail."""

    def __init__(self) -> None:
        self.store = InMemoryStore()
        self.reads, self.writes = Faults(), Faults()

    def namespace(self, name: bytes, page_bytes: int) -> FaultyDisk:
        pages = FaultyDisk(self.store.namespace(name, page_bytes))
        pages.reads, pages.writes = self.reads, self.writes
        return pages

    def clear(self) -> None:
        self.store.clear()

    def release(self) -> None:
        """It works, and goes on."""
        for faults in (self.reads, self.writes):
            faults.error = None
            faults.release()


def serving_parts(
    pool: Any,
    allocator: Any,
    page_size: int,
    n_host_pages: int,
    disk: PretendDisk | None,
    version: Callable[[], int],
    device: DeviceBuffers | None = None,
) -> CacheParts:
    """The tiers over SGLang's pool. version: that of the weights in use. device: what of the pool
    the pages consist of, None: all."""
    device = device or buffers_of(pool)
    page_format = buffer_format(page_size, device.layers, device.buffers)
    host = HostPool(page_format, n_host_pages * page_format.slot_bytes)
    forest = Forest(page_size)
    events = KvEvents(page_size, False)
    residency = ResidencyLog(events)

    def name_weights() -> tuple[bytes, tuple[PageStore, ...]]:
        name = namespace_hash("the KV model", str(version()))
        if disk is None:
            return name, ()
        return name, (LocalStore(disk.namespace(name, page_format.page_bytes), page_format),)

    name, stores = name_weights()
    context = TierContext(
        forest=forest,
        manager=MemoryManager(forest, MemoryConfig()),
        copier=CpuPageCopier(page_size, device.layers, device.buffers, host.pages),
        allocator=EngineAllocator(allocator),
        host=host,
        stores=stores,
        listener=residency,
    )
    hierarchy = KVHierarchy(context, name)
    return CacheParts(
        hierarchy=hierarchy,
        disk_store=disk,
        has_disk=disk is not None,
        store=None,
        events=events,
        metrics=MetricsRecorder(),
        host_report=HostReport(host),
        name_weights=name_weights,
        step_times=StepTimes(hierarchy, synchronous=True),
        residency=residency,
        cost_model=None,
    )
