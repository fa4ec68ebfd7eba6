"""The prefix cache that SGLang's scheduler talks to, over the three tiers.

Inherits from RadixCache what concerns requests (`cache_finished_req`, `cache_unfinished_req`, the
event queue) and overrides everything that concerns the tree. The interface is the one HiRadixCache
offers (mem_cache/hiradix_cache.py); who calls what is listed in docs/upstream_contract.md.
"""

from __future__ import annotations

import logging
import time
from array import array
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InitLoadBackParams,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixCache

from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.node import Node
from tiered_kv.plugin.cache.observer import NoObserver, RequestObserver
from tiered_kv.plugin.cache.weight_names import WeightNames
from tiered_kv.plugin.requests.view import is_named_by_tokens, is_probe, note_store_tokens
from tiered_kv.tiers.context import device_slots_of
from tiered_kv.tiers.hierarchy import KVHierarchy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from tiered_kv.plugin.cache.parts import CacheParts

logger = logging.getLogger(__name__)

#: How long a shutdown waits for pages that are still on their way to the disk.
WRITE_OUT_TIMEOUT_S = 5.0
#: How long it takes altogether, whatever hangs.
CLOSE_TIMEOUT_S = 10.0

#: An idle scheduler comes by thousands of times a second.
INTEGRITY_CHECK_S = 1.0


class TieredPrefixCache(RadixCache):
    """Node handles are `forest.Node`; device indices are int64 token slots on the device."""

    # Read by the scheduler (managers/scheduler.py: _prefetch_kvcache).
    hicache_storage_pass_prefix_keys = False

    def __init__(self, params: CacheInitParams, parts: CacheParts) -> None:
        self._hierarchy: KVHierarchy | None = None
        super().__init__(params)  # calls reset()
        self.hierarchy: KVHierarchy = parts.hierarchy
        self._hierarchy = parts.hierarchy
        self.parts = parts
        # Read by the hooks in step_times.py.
        self.step_times = parts.step_times
        self.enable_storage: bool = parts.has_disk or parts.store is not None
        # Read by the metrics reporter and by the output streamer.
        self.token_to_kv_pool_host = parts.host_report
        self.cache_controller = parts.controller_report
        self.root_node = self.hierarchy.root()
        # Whoever keeps the waiting queue in order, if one of our policies does.
        self.observer: RequestObserver = NoObserver()
        # KV tokens that the decode launched last need not read, as others of it do.
        self.saved_tokens = 0
        # Where what was inserted last ended in the tree.
        self._last_inserted = self.root_node
        self.weights = WeightNames(parts.hierarchy, parts.name_weights)
        self._checked_at = 0.0

    # -- lookup -------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The device part of the prefix now, and how many tokens the host could add."""
        if not self.weights.is_named:
            self.look_at_weights()
        key = params.key
        hierarchy = self.hierarchy
        root = hierarchy.root(key.extra_key)
        prefix = hierarchy.match(root, key.token_ids, key.limit)
        if len(prefix.device) == 1:
            indices = device_slots_of(prefix.device[0])
        elif prefix.device:
            indices = torch.cat([device_slots_of(node) for node in prefix.device])
        else:
            indices = self._no_indices
        return MatchResult(
            device_indices=indices,
            last_device_node=prefix.last_device,
            last_host_node=prefix.last,
            best_match_node=prefix.last,
            host_hit_length=prefix.n_host_tokens,
        )

    def root_node_handle(self, extra_key: TreeKey | None = None) -> Node:
        return self.hierarchy.root(extra_key)

    def is_root(self, node: Node) -> bool:
        return node.is_root

    def is_backuped(self, node: Node) -> bool:
        """Every node can anchor a prefetch: pages are found by hash, whatever tier it is in."""
        return True

    def get_last_hash_value(self, node: Node) -> str | None:
        return None if node.is_root else node.last_page_hash.hex()

    # -- admission ----------------------------------------------------------------------------

    def init_load_back(self, params: InitLoadBackParams) -> tuple[torch.Tensor, Node]:
        """Brings the host part of a prefix to the device, under a lock on its device part.

        As much of it as is sooner loaded than computed. The copy itself starts with the batch
        (`ready_to_load_host_cache`). Without room nothing is loaded, and the request is told so:
        SGLang would keep counting the host hit.
        """
        last: Node = params.best_match_node
        req = params.req
        if req is not None and self.parts.store is not None:
            n_read = self.hierarchy.prefetch.loaded_tokens_from(req.rid, Tier.STORE)
            note_store_tokens(req, n_read)
        n_tokens = None if req is None else len(req.origin_input_ids) + len(req.output_ids)
        loaded = self.hierarchy.load_back.load(last, n_tokens)
        if loaded is not None:
            slots, last = loaded
            if req is not None:
                req.host_hit_length = len(slots)
            return slots, last
        if req is not None:
            req.host_hit_length = 0
        while not last.is_root and not self._on_device(last):
            assert last.parent is not None
            last = last.parent
        return self._no_indices, last

    @staticmethod
    def _on_device(node: Node) -> bool:
        return node.slots(Tier.DEVICE) is not None

    def ready_to_load_host_cache(self) -> int:
        return self.hierarchy.load_back.start()

    def prefetch_from_storage(
        self,
        rid: str,
        last_host_node: Node,
        new_input_tokens: array[int],
        last_hash: str | None = None,
        prefix_keys: list[str] | None = None,
    ) -> None:
        self.hierarchy.prefetch.request(rid, last_host_node, new_input_tokens)

    def check_prefetch_progress(self, rid: str) -> bool:
        return self.hierarchy.prefetch.done(rid)

    def pop_prefetch_loaded_tokens(self, rid: str) -> int:
        """Not popped: a request that is not admitted now asks again in the next pass."""
        return self.hierarchy.prefetch.loaded_tokens(rid)

    def release_aborted_request(self, rid: str) -> None:
        self.hierarchy.prefetch.release(rid)

    terminate_prefetch = release_aborted_request

    # -- insertion ----------------------------------------------------------------------------

    def insert(self, params: InsertParams) -> InsertResult:
        key, slots = params.key, params.value
        assert key is not None
        assert slots is not None
        result = self.hierarchy.insert(self.hierarchy.root(key.extra_key), key.token_ids, slots)
        self._last_inserted = result.last
        return InsertResult(prefix_len=result.resident_tokens, last_device_node=result.last)

    def cache_finished_req(
        self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        self.hierarchy.prefetch.release(req.rid)
        if is_insert and not is_probe(req):
            self.parts.metrics.finished(req)
            if self.parts.watched is not None:
                self.parts.watched.finished(req)
        is_insert = is_insert and is_named_by_tokens(req)
        self._last_inserted = self.root_node
        super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
        self.observer.released(req, self._last_inserted)

    def cache_unfinished_req(self, req: Req, chunked: bool = False) -> None:
        self.hierarchy.prefetch.release(req.rid)
        if not chunked:
            self.observer.first_token(req)
        if is_named_by_tokens(req):
            super().cache_unfinished_req(req, chunked)
            return
        # The request goes on with slots of its own, as upstream's ChunkCache does it.
        slots = self.req_to_token_pool.req_to_token[req.req_pool_idx, : len(req.get_fill_ids())]
        req.prefix_indices = slots.to(dtype=torch.int64, copy=True)

    # -- eviction and locks -------------------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        started = time.perf_counter()
        n_evicted = self.hierarchy.evict_device(params.num_tokens)
        self.update_eviction_metrics(n_evicted, started)
        return EvictResult(num_tokens_evicted=n_evicted)

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        self.hierarchy.context.forest.pin(node, Tier.DEVICE)
        return IncLockRefResult()

    def dec_lock_ref(self, node: Node, params: DecLockRefParams | None = None) -> DecLockRefResult:
        self.hierarchy.context.forest.unpin(node, Tier.DEVICE)
        return DecLockRefResult()

    def evictable_size(self) -> int:
        return self.hierarchy.context.forest.evictable_tokens(Tier.DEVICE)

    def protected_size(self) -> int:
        return self.hierarchy.context.forest.protected_tokens(Tier.DEVICE)

    def total_size(self) -> int:
        return self.evictable_size() + self.protected_size()

    def all_values_flatten(self) -> torch.Tensor:
        forest = self.hierarchy.context.forest
        values = [device_slots_of(node) for node in forest.nodes() if self._on_device(node)]
        return torch.cat(values) if values else self._no_indices

    # -- progress, and what the scheduler's idle test reads -------------------------------------

    def check_hicache_events(self) -> None:
        """Called once per scheduling pass, idle or not: the hierarchy's clock tick."""
        self.hierarchy.poll()
        self.observer.polled()
        if self.parts.watched is not None:
            self.parts.watched.polled()
        self._refresh_metrics()

    def keep_up(self) -> None:
        """Called while everything is paused: transfers end, and nothing else is to begin."""
        self.hierarchy.poll()
        self._refresh_metrics()
        self.hierarchy.rest()

    def _refresh_metrics(self) -> None:
        parts = self.parts
        n_tokens = self.token_to_kv_pool_allocator.size
        link = None if parts.store is None else parts.store.link
        if parts.metrics.refresh(self.hierarchy, parts.disk_store, link, n_tokens):
            parts.metrics.longest_wait(self.observer.wait_over_bound_s())

    # A scheduler that asks whether it is idle means its requests. Transfers go on behind, and
    # whatever needs them out of the way settles them (`reset`, idle.py).
    ongoing_write_through = ongoing_load_back = ongoing_prefetch = ongoing_backup = range(0)

    # -- administration -----------------------------------------------------------------------

    def reset(self) -> None:
        """Empties device and host (`/flush_cache`, weight updates); the disk keeps its pages."""
        self._no_indices = torch.empty((0,), dtype=torch.int64, device=self.device)
        if self._hierarchy is not None:
            self._hierarchy.flush()
            self.weights.emptied()
            self.root_node = self._hierarchy.root()
            self.parts.events.cleared()
            self.observer.emptied()

    def look_at_weights(self) -> None:
        """The weights may have changed, and something is about to be computed with them."""
        self.weights.look()
        self.root_node = self.hierarchy.root()

    def take_events(self) -> list[Any]:
        return self.parts.events.take()

    def clear_storage_backend(self) -> bool:
        """Forgets what the disk holds (`/clear_hicache_storage_backend`); it is deleted behind.

        What servers share is not one server's to delete.
        """
        if not self.parts.has_disk:
            logger.warning("Tiered KV: there is no disk tier to clear.")
            return False
        self.hierarchy.forget_stored(Tier.DISK)
        if self.parts.disk_store is not None:
            self.parts.disk_store.clear()
        return True

    def attach_storage_backend(self, **kwargs: Any) -> tuple[bool, str]:
        return False, (
            "Tiered KV has its own stores; choose them at start by --tiered-kv-disk-dir and "
            "--tiered-kv-store."
        )

    def detach_storage_backend(self) -> tuple[bool, str]:
        return False, "Tiered KV's stores cannot be detached while the server runs."

    def release_host_resources(self) -> None:
        """On shutdown: pages on their way to the stores get a few seconds to arrive."""
        store = self.parts.store
        write_out_s = WRITE_OUT_TIMEOUT_S if store is None else store.drain_s
        deadline = time.monotonic() + write_out_s + CLOSE_TIMEOUT_S - WRITE_OUT_TIMEOUT_S
        self.hierarchy.close(write_out_s)
        if store is not None:
            store.close()
        if self.hierarchy.context.timeline is not None:
            self.hierarchy.context.timeline.close()
        if self.parts.disk_store is not None:
            self.parts.disk_store.close(max(deadline - time.monotonic(), 1.0))

    def check_integrity(self) -> None:
        """Recomputes the forest's books, at most once a second; raises IntegrityError."""
        now = time.monotonic()
        if now - self._checked_at >= INTEGRITY_CHECK_S:
            self._checked_at = now
            self.hierarchy.context.forest.check_integrity()

    def pretty_print(self) -> None:
        print(self.hierarchy.context.forest.view())  # noqa: T201
