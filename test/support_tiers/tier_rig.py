"""A hierarchy over a small pretend engine, in which every page's bytes are known in advance.

The KV of a page is a pure function of its chained hash (`page_kv`), so a page that was mixed up,
torn, or served before it arrived is seen at once, in whatever tier. `Rig` plays the engine: it
admits requests the way SGLang's scheduler does (match, lock, load back, allocate, start, run layer
by layer behind the gate, insert), and accounts for every slot of both pools.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any

import torch

from support_tiers.doubles import (
    PATIENCE_S,
    Faults,
    FaultyCopier,
    FaultyDisk,
    FaultyEncodedCopier,
    PagedAllocator,
)
from support_tiers.engine import (
    N_LAYERS,
    NAMESPACE,
    PAGE_SIZE,
    Events,
    Request,
    page_kv,
    tokens_of,  # noqa: F401 (tests of the rig take it from here)
)
from support_tiers.page_codec import PageCodec, codec, lasting_page, page_layout
from support_tiers.rig_checks import RigChecks
from support_tiers.rig_requests import RigRequests
from support_tiers.shared_blobs import SharedBlobs
from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import TreeKey, page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.tiers.cold.local_pages import LocalStore
from tiered_kv.tiers.cold.read_queue import ReadQueue
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.cold.writes import ColdWrite
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import buffer_format, byte_pages
from tiered_kv.tiers.encoded_store import EncodedDisk
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import PageStore, StoreTraits
from tiered_kv.tiers.replicas import PartCopier, StoreOfAnother
from tiered_kv.tiers.shared.link import StoreLink
from tiered_kv.tiers.transfer import Collective, Meeting, SingleRank, TransferQueue

#: How long a transfer is held back from a call that must wait for it.
A_MOMENT_S = 0.05


class Rig(RigChecks, RigRequests):
    """An engine with `n_device_pages`, over `n_host_pages` and `disk` (None: no disk tier).

    host_format: what the host keeps pages in. lasting: a format; what is computed are then pages
    that this format does not change. remote: a store below, which others use as well, to which
    `store_writes` go. pool: where two rigs have the same host pool; the one at place 0 has the disk
    for both.
    """

    def __init__(
        self,
        n_device_pages: int = 32,
        n_host_pages: int = 32,
        disk: Any = None,
        *,
        page_size: int = PAGE_SIZE,
        collective: Collective | None = None,
        stages: Meeting | None = None,
        namespace: bytes = NAMESPACE,
        shard: int = 0,
        host_format: str = "raw",
        lasting: str | None = None,
        remote: SharedBlobs | None = None,
        store_writes: str = "all",
        pool: mmap.mmap | None = None,
        place: int = 0,
    ) -> None:
        self.page_size = page_size
        self.has_disk_elsewhere = pool is not None and place > 0
        self.lasting = lasting
        self.host_codec: PageCodec | None = None
        layers = [layer for layer in range(N_LAYERS) for _ in range(2)]
        n_slots = (n_device_pages + 1) * page_size
        self.buffers = [torch.zeros(n_slots, 2, 4, dtype=torch.bfloat16) for _ in layers]
        self._pages = [byte_pages(buffer, page_size).numpy() for buffer in self.buffers]
        self.page_format = buffer_format(page_size, layers, self.buffers)
        self.shard = shard
        host_page = self.page_format
        if host_format != "raw":
            self.host_codec = codec(host_format, page_size, N_LAYERS)
            host_page = PageFormat.of_layout(self.host_codec.layout)
        self.host = HostPool(host_page, n_host_pages * host_page.slot_bytes, shared=pool)
        self.copier = self._make_copier(layers)
        self.allocator = PagedAllocator(n_device_pages, page_size)
        self.remote = remote
        self.namespace = namespace
        tiers = tuple(tier for tier in Tier if tier is not Tier.STORE or remote is not None)
        self.forest = Forest(page_size, tiers=tiers)
        self.events = Events()
        self.disk = disk
        self.config = MemoryConfig(store_writes=store_writes)
        manager = MemoryManager(self.forest, self.config)
        self.context = TierContext(
            self.forest,
            manager,
            self.copier if pool is None else PartCopier(self.copier, place, 2),
            self.allocator,
            self.host,
            self.stores_of(disk),
            collective or SingleRank(),
            self.events,
            self.events,
            stages=stages,
        )
        self.hierarchy = KVHierarchy(self.context, namespace)
        self.requests: list[Request] = []
        #: Every page hash this rig has met, for looking at the disk.
        self.known_hashes: set[bytes] = set()

    def _make_copier(self, layers: list[int]) -> Any:
        if self.host_codec is None:
            return FaultyCopier(self.page_size, layers, self.buffers, self.host.pages)
        return FaultyEncodedCopier(self.buffers, self.host_codec.layout, self.host.pages)

    # -- its cold stores ----------------------------------------------------------------------

    def stores_of(self, disk: Any, page_format: PageFormat | None = None) -> tuple[PageStore, ...]:
        """`disk` as the tiers take it; page_format: what it keeps, if not pages as on the host.

        And what is shared with others, if there is such a thing.
        """
        stores: list[PageStore] = []
        if disk is not None:
            stores.append(LocalStore(disk, page_format or self.copier.page_format))
        elif self.has_disk_elsewhere:
            traits = StoreTraits(Tier.DISK, page_format or self.copier.page_format)
            stores.append(StoreOfAnother(traits))
        if self.remote is not None:
            page_format = self.copier.page_format
            traits = StoreTraits(Tier.STORE, page_format, knows_locally=False, is_shared=True)
            name = hashlib.sha256(self.namespace + bytes([self.shard])).digest()
            # Here, as envelopes need `cryptography`, which the order check on a GPU does without.
            from tiered_kv.tiers.shared.object_store import ObjectStore

            stores.append(ObjectStore(StoreLink(self.remote), name, traits))
        return tuple(stores)

    def use(self, disk: Any, page_format: PageFormat | None = None) -> None:
        """From now on `disk` is the disk, for the present weights."""
        self.disk = disk
        self.context.stores = self.stores_of(disk, page_format)
        for cold, store in zip(self.hierarchy.colds, self.context.stores, strict=False):
            cold.use(store)

    @property
    def cold(self) -> ColdTier:
        """The nearest."""
        return self.hierarchy.colds[0]

    @property
    def reads(self) -> ReadQueue:
        return self.cold.reads

    @property
    def writes(self) -> TransferQueue[ColdWrite]:
        return self.cold.writes.queue

    # -- what the model computes --------------------------------------------------------------

    def kv(self, page_hash: bytes) -> bytes:
        """The page's bytes on this rig's shard."""
        self.known_hashes.add(page_hash)
        if self.shard:
            page_hash = page_hash + bytes([self.shard])
        if self.lasting is not None:
            return lasting_page(self.lasting, self.page_size, N_LAYERS, page_hash)
        return page_kv(page_hash, self.page_format.page_bytes)

    def hashes(self, root: Node, tokens: array[int]) -> list[bytes]:
        return page_hashes(root.last_page_hash, tokens, self.page_size)

    # -- waiting ------------------------------------------------------------------------------

    def poll_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"not reached: {self.forest.view()}"
            self.hierarchy.poll()
            time.sleep(0.0005)

    @property
    def in_flight(self) -> int:
        hierarchy = self.hierarchy
        return (
            hierarchy.write_back.to_host.in_flight
            + sum(cold.writes.queue.in_flight for cold in hierarchy.colds)
            + hierarchy.write_back.n_deferred
            # A store that refused them is offered these again later.
            - sum(cold.writes.n_deferred for cold in hierarchy.colds if cold.writes.wants_time)
            + hierarchy.load_back.n_open
            + hierarchy.prefetch.lookups.queue.in_flight
            + sum(cold.reads.in_flight for cold in hierarchy.colds)
        )

    def drain(self) -> None:
        """Polls until nothing is on its way; the server would then be idle."""
        self.hierarchy.poll()
        self.poll_until(lambda: self.in_flight == 0)

    def prefetch(self, rid: str, tokens: array[int], key: TreeKey | None = None) -> int:
        """The whole prefetch of a request; returns the tokens it brought."""
        self.arrive(rid, tokens, key)
        self.poll_until(lambda: self.hierarchy.prefetch.done(rid))
        n_tokens = self.hierarchy.prefetch.loaded_tokens(rid)
        self.hierarchy.prefetch.release(rid)
        return n_tokens

    def meanwhile(self, call: Callable[[], Any], *releases: Faults) -> Any:
        """Calls what waits for transfers that are held back, and releases them meanwhile.

        Fails if the call does not wait for them.
        """
        released = threading.Event()

        def release() -> None:
            time.sleep(A_MOMENT_S)
            released.set()
            for faults in releases:
                faults.release()

        thread = threading.Thread(target=release)
        thread.start()
        outcome = call()
        assert released.is_set(), "it did not wait"
        thread.join()
        return outcome

    # -- looking ------------------------------------------------------------------------------

    def usable(self, tokens: array[int], key: TreeKey | None = None) -> tuple[int, int]:
        """(pages on the device, further pages on the host) that a request could use now."""
        prefix = self.hierarchy.match(self.hierarchy.root(key), tokens)
        return sum(node.n_pages for node in prefix.device), sum(n.n_pages for n in prefix.host)

    def stored_pages(self, tokens: array[int], key: TreeKey | None = None) -> int:
        """Leading pages of `tokens` on disk."""
        return int(self.disk.count_prefix(self.hashes(self.hierarchy.root(key), tokens)))

    def stop_clock(self) -> None:
        """No time passes from now on but by `later`."""
        progress, stopped_s = self.hierarchy.progress, time.monotonic()
        progress._clock = lambda: stopped_s

    def later(self, seconds: float) -> None:
        """So much time passes until the next pass of the scheduler's loop."""
        self.hierarchy.progress._started_at -= seconds
        self.hierarchy.poll()

    def drop_from_device(self) -> None:
        self.hierarchy.evict_device(self.allocator.n_pages * self.page_size)

    def drop_from_host(self) -> None:
        self.context.evict_host(self.host.n_pages)

    def flush(self) -> None:
        """Like `/flush_cache`, with no request left; pages may still be on their way to disk."""
        assert not self.requests
        self.hierarchy.flush()
        self.allocator.free_pages = list(range(1, self.allocator.n_pages + 1))
        self.events.held.clear()

    def close(self) -> None:
        """Ends the threads, whatever they are doing."""
        for faults in (self.copier.up, self.copier.down):
            faults.release()
        if isinstance(self.disk, FaultyDisk):
            self.disk.reads.release()
            self.disk.writes.release()
        if self.remote is not None:
            self.remote.release()
        for queue in self.hierarchy.queues():
            queue.close()


def new_disk(
    store: InMemoryStore | None = None,
    namespace: bytes = NAMESPACE,
    *,
    host_format: str = "raw",
    disk_format: str | None = None,
) -> FaultyDisk:
    """A disk tier in memory, for the rig's pages; disk_format: what it keeps them in, if not as the
    host does."""
    host = page_layout(host_format, PAGE_SIZE, N_LAYERS)
    stored = page_layout(disk_format or host_format, PAGE_SIZE, N_LAYERS)
    pages = (store or InMemoryStore()).namespace(namespace, stored.page_bytes)
    return FaultyDisk(pages if stored == host else EncodedDisk(pages, host, stored))


def on_host(rig: Rig, *prompts: array[int]) -> None:
    """Serves the prompts and leaves them on the host (and the disk, if there is one) alone."""
    for prompt in prompts:
        rig.serve(prompt)
    rig.drain()
    rig.drop_from_device()


def on_disk(rig: Rig, *prompts: array[int]) -> None:
    """Serves the prompts and leaves them on the disk alone."""
    on_host(rig, *prompts)
    rig.drop_from_host()
    assert len(rig.forest) == 0
