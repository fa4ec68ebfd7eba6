"""The prefix cache that SGLang's scheduler talks to, over the three tiers.

Inherits from RadixCache what concerns requests, and overrides everything that concerns the tree.
What a release calls in a way of its own is in its `CacheContract` (`upstream/*/cache_contract.py`);
who calls what is listed in docs/upstream_contract.md.
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
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)

from tiered_kv.core.ids import Tier
from tiered_kv.forest.inputs import PromptKey
from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.node import Node
from tiered_kv.plugin.cache.observer import NoObserver, RequestObserver
from tiered_kv.plugin.cache.weight_names import WeightNames
from tiered_kv.plugin.requests.inputs import as_named
from tiered_kv.plugin.requests.salts import root_key
from tiered_kv.plugin.requests.view import is_named, is_probe, note_store_tokens
from tiered_kv.plugin.upstream.current import cache_contract
from tiered_kv.tiers.context import device_slots_of
from tiered_kv.tiers.hierarchy import KVHierarchy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from tiered_kv.memory.actions import Load
    from tiered_kv.plugin.cache.parts import CacheParts
    from tiered_kv.tiers.control.control import CacheControl

logger = logging.getLogger(__name__)

#: How long a shutdown waits for pages that are still on their way to the disk.
WRITE_OUT_TIMEOUT_S = 5.0
#: How long it takes altogether, whatever hangs.
CLOSE_TIMEOUT_S = 10.0

#: An idle scheduler comes by thousands of times a second.
INTEGRITY_CHECK_S = 1.0


class TieredPrefixCache(cache_contract.CacheContract):
    """Node handles are `forest.Node`; device indices are int64 token slots on the device."""

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
        self.init_contract(parts.controller_report)
        self.root_node = self.hierarchy.root()
        # Whoever keeps the waiting queue in order, if one of our policies does.
        self.observer: RequestObserver = NoObserver()
        # KV tokens that the decode launched last need not read, as others of it do.
        self.saved_tokens = 0
        # Where what was inserted last ended in the tree.
        self.last_inserted = self.root_node
        # What names the prompt that was looked up last.
        self._last_key: PromptKey | TreeKey | str | None = None
        # What would be loaded for the request that is being admitted, and where it ends.
        self._planned: tuple[Node, Load] | None = None
        # Whether the pass that was formed last reads KV that may still be on its way.
        self.pass_awaits_loads = False
        # Once an administrator has given an order.
        self.control: CacheControl | None = None
        self.weights = WeightNames(parts.hierarchy, parts.name_weights)
        self._checked_at = 0.0

    # -- lookup -------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """The device part of the prefix now, and how many tokens the host could add."""
        if not self.weights.is_named:
            self.look_at_weights()
        key = params.key
        self._last_key = key.extra_key
        hierarchy = self.hierarchy
        prefix = hierarchy.match(self._root_of(key), self._named(key), self._limit_of(key))
        return self.match_result(
            [device_slots_of(node) for node in prefix.device],
            prefix.last_device,
            prefix.last,
            prefix.n_host_tokens,
        )

    def touch_prefix(self, key: Any) -> None:
        """Somebody who waits is going to want this prefix: it counts as used now."""
        self.hierarchy.match(self._root_of(key), self._named(key), self._limit_of(key))

    def _limit_of(self, key: Any) -> int | None:
        """How much of what names its pages counts."""
        limit: int | None = key.limit
        return limit if limit is None else limit - int(self.is_eagle)

    def _named(self, key: Any) -> array[int]:
        return as_named(key.token_ids, key.extra_key, self.hierarchy.context)

    def _root_of(self, key: Any) -> Node:
        return self.hierarchy.root(root_key(key.extra_key, cache_contract.salt_of(key)))

    def root_node_handle(self, extra_key: PromptKey | TreeKey | None = None) -> Node:
        return self.hierarchy.root(root_key(extra_key))

    def is_root(self, node: Node) -> bool:
        return node.is_root

    def is_backuped(self, node: Node) -> bool:
        """Every node can anchor a prefetch: pages are found by hash, whatever tier it is in."""
        return True

    def get_last_hash_value(self, node: Node) -> str | None:
        return None if node.is_root else node.last_page_hash.hex()

    # -- admission ----------------------------------------------------------------------------

    def note_loading(self, req: Req) -> None:
        """What the host has for `req` is about to be loaded: whence it had that is known now."""
        if self.parts.store is not None:
            n_read = self.hierarchy.prefetch.loaded_tokens_from(req.rid, Tier.STORE)
            note_store_tokens(req, n_read)

    def load_back(self, last: Node, n_tokens: int | None) -> tuple[torch.Tensor, Node]:
        """Has as much of the run that ends at `last` loaded as is sooner loaded than computed.

        Returns (its slots, its last node); n_tokens: of the prompt, if it is known.
        """
        loaded = self.hierarchy.load_back.load(last, n_tokens)
        return loaded or (self.nothing, self._device_part(last))

    def plan_load(self, last: Node, n_tokens: int, start: int) -> tuple[int, Node]:
        """What `load_back` would bring for whoever is admitted now: (tokens, last node).

        start: so many tokens of its prompt are on the device.
        """
        del start
        action = self.hierarchy.load_back.plan(last, n_tokens)
        if action is None:
            self._planned = None
            return 0, self._device_part(last)
        nodes = [self.hierarchy.context.forest.node(node_id) for node_id in action.node_ids]
        self._planned = nodes[-1], action
        return sum(node.n_tokens for node in nodes), nodes[-1]

    def carry_out_load(self, last: Node) -> tuple[torch.Tensor, Node]:
        """As `load_back`, of what was planned to end at `last`: all of it, or nothing."""
        planned, self._planned = self._planned, None
        loaded = None
        if planned is not None and planned[0] is last:
            loaded = self.hierarchy.load_back.carry_out(planned[1])
        return loaded or (self.nothing, self._device_part(last))

    def _device_part(self, last: Node) -> Node:
        """The last node on the way to `last` that is on the device."""
        while not last.is_root and not self._on_device(last):
            assert last.parent is not None
            last = last.parent
        return last

    @staticmethod
    def _on_device(node: Node) -> bool:
        return node.slots(Tier.DEVICE) is not None

    def ready_to_load_host_cache(self) -> int:
        index = self.hierarchy.load_back.start()
        self.pass_awaits_loads = index >= 0
        return index

    def prefetch(self, rid: str, last_host_node: Node, new_input_tokens: array[int]) -> None:
        """new_input_tokens: those behind `last_host_node` of the prompt that was matched last."""
        begin = last_host_node.end
        tokens = as_named(new_input_tokens, self._last_key, self.hierarchy.context, begin)
        self.hierarchy.prefetch.request(rid, last_host_node, tokens)

    def is_prefetched(self, rid: str) -> bool:
        return self.hierarchy.prefetch.done(rid)

    def prefetched_tokens(self, rid: str) -> int:
        return self.hierarchy.prefetch.loaded_tokens(rid)

    def release_prefetch(self, rid: str) -> None:
        self.hierarchy.prefetch.release(rid)

    # -- insertion ----------------------------------------------------------------------------

    def insert(self, params: InsertParams) -> InsertResult:
        key, slots = params.key, params.value
        assert key is not None
        assert slots is not None
        result = self.hierarchy.insert(self._root_of(key), self._named(key), slots)
        self.last_inserted = result.last
        return InsertResult(prefix_len=result.resident_tokens, last_device_node=result.last)

    def note_own(self, start: int) -> None:
        """The request whose KV is inserted next has computed it from token `start` on."""

    def is_to_be_cached(self, req: Req) -> bool:
        return is_named(req)

    def goes_on(self, req: Req, *, has_token: bool) -> None:
        """A chunk of the prompt of `req` was computed, or all of it: then it has a token."""
        self.release_prefetch(req.rid)
        if has_token:
            self.observer.first_token(req)

    def is_ending(self, req: Req, *, is_counted: bool) -> None:
        """`req` is about to give up its KV; is_counted: since it has its answer."""
        self.release_prefetch(req.rid)
        if is_counted and not is_probe(req):
            self.parts.metrics.finished(req)
            if self.parts.watched is not None:
                self.parts.watched.finished(req)
        self.last_inserted = self.root_node

    def kept(self, req: Req, last: Node, n_tokens: int) -> None:
        """Of the first `n_tokens` of `req` what fills pages is in the tree, down to `last`."""

    def has_ended(self, req: Req, last: Node) -> None:
        """`req` has given up its KV, which is in the tree down to `last`."""
        self.observer.released(req, last)

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
        return torch.cat(values) if values else self.nothing

    # -- progress, and what the scheduler's idle test reads -------------------------------------

    def check_hicache_events(self) -> None:
        """Called once per scheduling pass, idle or not: the hierarchy's clock tick."""
        self.hierarchy.poll()
        self.observer.polled()
        if self.parts.watched is not None:
            self.parts.watched.polled()
        if self.control is not None:
            self.control.polled()
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
        self.nothing = torch.empty((0,), dtype=torch.int64, device=self.device)
        if self._hierarchy is not None:
            self._hierarchy.flush()
            cache_contract.forget_encoded()
            self.weights.emptied()
            self.root_node = self._hierarchy.root()
            self.parts.events.cleared()
            self.observer.emptied()

    def look_at_weights(self) -> None:
        """The weights may have changed, and something is about to be computed with them."""
        cache_contract.forget_encoded()
        self.weights.look()
        self.root_node = self.hierarchy.root()

    def take_events(self) -> list[Any]:
        return self.parts.events.take()

    def clear_storage_backend(self) -> bool:
        """Forgets what the disk holds (`/hicache/storage-backend/clear`); it is deleted behind.

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
