"""The three tiers as one cache: what the engine's prefix cache calls.

One thread owns a hierarchy (the scheduler's). Every call returns without waiting for I/O, but for
`settle_*`, which wait for memory copies that are already running.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.results import InsertResult
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import DeviceSlots
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.load_back import LoadBack
from tiered_kv.tiers.prefetch import Prefetch
from tiered_kv.tiers.transfer import Completion, J, SingleRank
from tiered_kv.tiers.write_back import WriteBack


@dataclass(frozen=True, slots=True)
class UsablePrefix:
    """What a prompt can reuse: `device` nodes now, then `host` nodes after a load.

    Nodes LOADING on the device count as device nodes: the batch that runs over them waits at the
    gate, layer by layer.
    """

    root: Node
    device: tuple[Node, ...]
    host: tuple[Node, ...]

    @property
    def last_device(self) -> Node:
        return self.device[-1] if self.device else self.root

    @property
    def last(self) -> Node:
        return self.host[-1] if self.host else self.last_device

    @property
    def n_host_tokens(self) -> int:
        return sum(node.n_tokens for node in self.host)


class KVHierarchy:
    """Forest, policy and tiers, wired together.

    namespace: 32 bytes naming everything that makes KV reusable at all (the model's weights and
    configuration, dtype, page layout, tensor-parallel shard); a request's own key (adapter, tenant
    salt) picks the tree within it.
    """

    def __init__(self, context: TierContext, namespace: bytes) -> None:
        self.context = context
        self.write_back = WriteBack(context)
        self.load_back = LoadBack(context)
        self.prefetch = Prefetch(context)
        self._namespace = namespace

    # -- trees --------------------------------------------------------------------------------

    def root(self, extra_key: str | None = None) -> Node:
        """The root of the tree that requests with this key share."""
        return self.context.forest.root(_root_hash(self._namespace, extra_key))

    def set_namespace(self, namespace: bytes, disk: DiskNamespace | None) -> None:
        """After a flush: the weights have changed, and nothing cached before may be matched."""
        self._namespace = namespace
        self.context.disk = disk

    def suspend_disk(self) -> None:
        """The weights are changing: pages computed from now on have no name until a flush."""
        self.context.disk = None

    # -- what a request does ------------------------------------------------------------------

    def match(self, root: Node, tokens: array[int], limit: int | None = None) -> UsablePrefix:
        """The longest prefix of `tokens[:limit]` that device, then host, can provide now."""
        path = self.context.forest.match(root, tokens, limit).path
        n_device = 0
        for node in path:
            if node.state(Tier.DEVICE) is Residency.ABSENT:
                break
            n_device += 1
        n_usable = n_device
        for node in path[n_device:]:
            if node.state(Tier.HOST) is not Residency.RESIDENT:
                break
            n_usable += 1
        return UsablePrefix(root, path[:n_device], path[n_device:n_usable])

    def insert(self, root: Node, tokens: array[int], slots: torch.Tensor) -> InsertResult:
        """Takes over those device slots of `tokens` (whole pages) that the tree lacks.

        They are written through to the other tiers from here on; so is what an earlier attempt
        left unwritten (the tier had failed, or was full), for as long as it is in use. The caller
        frees those of `slots[:resident_tokens]` that are not the tree's own.
        """
        if self.load_back.n_open:
            # The tree's slots replace the caller's: they must hold the KV by then.
            self.settle_loads()
        result = self.context.forest.insert(root, tokens, DeviceSlots(slots))
        self.context.stored(result.adopted, Tier.DEVICE)
        self.write_back.inserted(result.adopted or (result.last,))
        self.write_back.resident_on_host((result.last,))
        return result

    def evict_device(self, n_tokens: int) -> int:
        """Frees at least `n_tokens` device slots if unpinned pages allow it; returns how many."""
        freed = self.context.evict_device(n_tokens)
        if freed < n_tokens and (self.write_back.to_host.in_flight or self.load_back.n_open):
            # Pages that a copy still holds: copies are short, and running out of slots is fatal.
            self.settle_host_writes()
            self.settle_loads()
            freed += self.context.evict_device(n_tokens - freed)
        return freed

    # -- progress -----------------------------------------------------------------------------

    def poll(self) -> None:
        """Acknowledges finished transfers and starts what waited for room; never blocks.

        Under tensor parallelism every rank must call it at the same points of its loop.
        """
        queues = (
            self.write_back.to_host,
            self.load_back.queue,
            self.write_back.to_disk,
            self.prefetch.queue,
        )
        if any(queue.in_flight for queue in queues):
            n_ready = self.context.collective.minimum([queue.n_ready for queue in queues])
            self._host_writes(n_ready[0])
            self._loads(n_ready[1])
            self._disk_writes(n_ready[2])
            self._disk_reads(n_ready[3])
        self.load_back.advance()
        self.write_back.advance()
        self.prefetch.advance()

    def settle_host_writes(self) -> None:
        """Waits for the device -> host copies under way."""
        self.write_back.to_host.wait()
        self._host_writes(self.write_back.to_host.in_flight)

    def settle_loads(self) -> None:
        """Waits for the host -> device copies asked for."""
        self.load_back.start()
        self.load_back.queue.wait()
        self._loads(self.load_back.queue.in_flight)

    def settle_disk(self) -> None:
        """Waits for all disk I/O under way."""
        self.write_back.to_disk.wait()
        self._disk_writes(self.write_back.to_disk.in_flight)
        self.prefetch.queue.wait()
        self._disk_reads(self.prefetch.queue.in_flight)

    def _host_writes(self, n: int) -> None:
        for completion in self._agreed(self.write_back.to_host.acknowledge(n)):
            self.write_back.host_written(completion)

    def _loads(self, n: int) -> None:
        for completion in self._agreed(self.load_back.queue.acknowledge(n)):
            self.load_back.loaded(completion)

    def _disk_writes(self, n: int) -> None:
        for completion in self._agreed(self.write_back.to_disk.acknowledge(n)):
            self.write_back.disk_written(completion)

    def _disk_reads(self, n: int) -> None:
        for completion in self._agreed(self.prefetch.queue.acknowledge(n)):
            self.prefetch.finished(completion)

    def _agreed(self, completions: list[Completion[J]]) -> list[Completion[J]]:
        """A page counts as moved only if it moved on every rank."""
        if not completions:
            return completions
        n_done = self.context.collective.minimum([c.n_done for c in completions])
        return [replace(c, n_done=n) for c, n in zip(completions, n_done, strict=True)]

    # -- whole-cache operations ---------------------------------------------------------------

    def flush(self) -> None:
        """Empties device and host bookkeeping; the disk keeps its pages.

        The caller has no request in flight, and resets the engine's allocator itself.
        """
        self.settle_host_writes()
        self.settle_loads()
        self.settle_disk()
        self.write_back.clear()
        self.prefetch.clear()
        self.context.forest.clear()
        self.context.host.clear()

    def forget_disk(self) -> None:
        """The disk is being cleared: no node may claim to be there."""
        self.settle_disk()
        for node in self.context.forest.nodes():
            if node.state(Tier.DISK) is Residency.RESIDENT:
                self.context.forest.evict(node, Tier.DISK)

    def close(self, timeout_s: float) -> None:
        """Lets what is still to be written reach the disk, as far as the time allows, and stops."""
        # Ranks shut down on their own: nobody to agree with any more.
        self.context.collective = SingleRank()
        deadline = time.monotonic() + timeout_s
        queues = (self.write_back.to_host, self.write_back.to_disk)
        while time.monotonic() < deadline:
            for queue in queues:
                queue.wait(max(0.0, deadline - time.monotonic()))
            self.poll()
            if not any(queue.in_flight for queue in queues) and not self.write_back.n_deferred:
                break
        for open_queue in (*queues, self.load_back.queue, self.prefetch.queue):
            open_queue.close()


@lru_cache(maxsize=4096)
def _root_hash(namespace: bytes, extra_key: str | None) -> bytes:
    parts = ("shared",) if extra_key is None else ("keyed", extra_key)
    return namespace_hash(namespace, *parts)
