"""What the prefix cache is made of; `build.py` puts it together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from tiered_kv.plugin.cache.events import KvEvents
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
from tiered_kv.plugin.cache.residency_log import ResidencyLog
from tiered_kv.plugin.cache.store import SharedStore
from tiered_kv.plugin.cache.watched import Watched
from tiered_kv.plugin.passes.pass_log import PassLog
from tiered_kv.plugin.passes.step_times import StepTimes
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.page_store import PageStore


class RankMinimum:
    """Agreement between tensor-parallel ranks over upstream's CPU group."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group

    def minimum(self, values: list[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN, group=self._group)
        return [int(value) for value in tensor.tolist()]

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, in their order; equally long on all."""
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self._group.size())]
        self._group.allgather([found], [own]).wait()
        return [bytes(one.tolist()) for one in found]


class HostReport:
    """What upstream's metrics reporter reads of a host pool, in tokens."""

    def __init__(self, host: HostPool) -> None:
        self._host = host
        self.logical_size = host.n_pages * host.page_format.page_size

    def available_size(self) -> int:
        return self._host.n_free * self._host.page_format.page_size


@dataclass(slots=True)
class CacheParts:
    """Everything the prefix cache is made of."""

    hierarchy: KVHierarchy
    disk_store: DiskTier | None
    """None on a rank for which another reads and writes it, too."""
    has_disk: bool
    store: SharedStore | None
    """None if there is none."""
    events: KvEvents
    metrics: MetricsRecorder
    host_report: HostReport
    name_weights: Callable[[], tuple[bytes, tuple[PageStore, ...]]] | None
    """Names the weights in use now, and opens their namespace in the cold stores.

    None where that cannot be had once requests have come.
    """
    step_times: StepTimes
    residency: ResidencyLog
    """What became cached, or ceased to be, while somebody waits."""
    cost_model: CostModel | None
    watched: Watched | None = None
    """None where nobody may ask for a snapshot, or another rank answers."""
    pass_log: PassLog | None = None
    """None if nobody wants to know of every pass."""

    @property
    def controller_report(self) -> SimpleNamespace:
        """What upstream's output streamer reads of a cache controller."""
        return SimpleNamespace(storage_backend=self.disk_store or self.store)
