"""What SGLang 0.5.17's scheduler calls of a prefix cache in a way of its own.

The interface is the one that HiRadixCache offers (mem_cache/hiradix_cache.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers import mm_utils
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixCache

from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.node import Node

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

#: Whether a scheduling pass asks for news (`check_hicache_events`) before it forms a prefill; else
#: it does so as the first thing in that.
POLLED_BEFORE_PREFILL = False
#: Whether only somebody's leaving has a batch looked at again that was called full, and who leaves
#: does so before a prefill is formed; else they leave after it, and the next pass looks again.
FULL_UNTIL_SOMEBODY_LEAVES = False


class CacheContract(RadixCache):
    """Inherits the accounting of requests' KV from RadixCache, and knows no tree.

    A subclass has `note_loading`, `load_back`, `prefetch`, `is_prefetched`, `prefetched_tokens`,
    `release_prefetch`, `goes_on`, `is_ending`, `is_to_be_cached`, `note_own`, `kept` and
    `has_ended`.
    """

    # Read by the scheduler (managers/scheduler.py: _prefetch_kvcache).
    hicache_storage_pass_prefix_keys = False

    def init_contract(self, controller_report: Any) -> None:
        """controller_report: what the output streamer reads of a cache controller."""
        self.cache_controller = controller_report

    def match_result(
        self, slots: list[torch.Tensor], device: Node, last: Node, n_host: int
    ) -> MatchResult:
        """What a match found: `slots` on the device down to `device`, then `n_host` tokens that
        the host could add, down to `last`."""
        indices = slots[0] if len(slots) == 1 else torch.cat(slots) if slots else self.nothing
        return MatchResult(
            device_indices=indices,
            last_device_node=device,
            last_host_node=last,
            best_match_node=last,
            host_hit_length=n_host,
        )

    def init_load_back(self, params: InitLoadBackParams) -> tuple[torch.Tensor, Node]:
        """Brings the host part of a prefix to the device, under a lock on its device part.

        As much of it as is sooner loaded than computed. The copy itself starts with the batch
        (`ready_to_load_host_cache`). Without room nothing is loaded, and the request is told so:
        SGLang would keep counting the host hit.
        """
        req, last = params.req, params.best_match_node
        if req is not None:
            self.note_loading(req)
        slots, last = self.load_back(last, None if req is None else _n_tokens(req))
        if req is not None:
            req.host_hit_length = len(slots)
        return slots, last

    # -- prefetching, by request id -------------------------------------------------------------

    def prefetch_from_storage(
        self,
        rid: str,
        last_host_node: Node,
        new_input_tokens: array[int],
        last_hash: str | None = None,
        prefix_keys: list[str] | None = None,
    ) -> None:
        self.prefetch(rid, last_host_node, new_input_tokens)

    def check_prefetch_progress(self, rid: str) -> bool:
        done: bool = self.is_prefetched(rid)
        return done

    def pop_prefetch_loaded_tokens(self, rid: str) -> int:
        """Not popped: a request that is not admitted now asks again in the next pass."""
        n_tokens: int = self.prefetched_tokens(rid)
        return n_tokens

    def release_aborted_request(self, rid: str) -> None:
        self.release_prefetch(rid)

    terminate_prefetch = release_aborted_request

    # -- insertion ------------------------------------------------------------------------------

    def cache_finished_req(
        self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        self.is_ending(req, is_counted=is_insert)
        is_insert = is_insert and self.is_to_be_cached(req)
        self.note_own(req.cache_protected_len)
        super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
        if is_insert:
            self.kept(req, self.last_inserted, kv_len_to_handle)
        self.has_ended(req, self.last_inserted)

    def cache_unfinished_req(self, req: Req, chunked: bool = False) -> None:
        self.goes_on(req, has_token=not chunked)
        if self.is_to_be_cached(req):
            self.note_own(req.cache_protected_len)
            super().cache_unfinished_req(req, chunked)
            self.kept(req, req.last_node, len(req.get_fill_ids()))
            return
        # The request goes on with slots of its own, as upstream's ChunkCache does it.
        slots = self.req_to_token_pool.req_to_token[req.req_pool_idx, : len(req.get_fill_ids())]
        req.prefix_indices = slots.to(dtype=torch.int64, copy=True)


def _n_tokens(req: Req) -> int:
    return len(req.origin_input_ids) + len(req.output_ids)


def salt_of(key: Any) -> str | None:
    """The salt of a RadixKey, if it has one of its own."""
    return None


def forget_encoded() -> None:
    """Weights may have changed: what is kept of the encoder's outputs is of others."""
    if mm_utils.embedding_cache is not None:
        mm_utils.embedding_cache.clear()


def block_labels(params: CacheInitParams) -> Callable[[TreeKey], Mapping[str, str]]:
    """Of the tree of some blocks, what their events say of it beside hashes: nothing."""
    return lambda _: {}
