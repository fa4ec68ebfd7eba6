"""What SGLang 0.5.23's scheduler calls of a prefix cache in a way of its own.

The interface is the one that UnifiedRadixCache offers (mem_cache/unified_radix_cache.py); requests
are told apart by their handles, and what RadixCache knows of them is `checkpoint` alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers import mm_schedule
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    InitLoadBackParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixCache

from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.node import Node
from tiered_kv.tiers.context import device_slots_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

#: Whether a scheduling pass asks for news (`check_hicache_events`) before it forms a prefill; else
#: it does so as the first thing in that.
POLLED_BEFORE_PREFILL = True
#: Whether only somebody's leaving has a batch looked at again that was called full, and who leaves
#: does so before a prefill is formed; else they leave after it, and the next pass looks again.
FULL_UNTIL_SOMEBODY_LEAVES = True


class CacheContract(RadixCache):
    """Inherits the accounting of requests' KV from RadixCache, and knows no tree.

    A subclass has `note_loading`, `plan_load`, `carry_out_load`, `prefetch`, `is_prefetched`,
    `prefetched_tokens`, `release_prefetch`, `goes_on`, `is_ending`, `is_to_be_cached`, `note_own`,
    `kept`, `has_ended` and `nothing`.
    """

    # Read by the scheduler (managers/scheduler.py: _prefetch_kvcache).
    hicache_storage_pass_prefix_keys = False

    def init_contract(self, controller_report: Any) -> None:
        """controller_report: what the output streamer reads of a cache controller."""
        # Of what it says at the start about objects in a store; ours are not for others to read.
        controller_report.storage_backend_type = None
        self.cache_controller = controller_report

    def match_result(
        self, slots: list[torch.Tensor], device: Node, last: Node, n_host: int
    ) -> MatchResult:
        """What a match found: `slots` on the device down to `device`, then `n_host` tokens that
        the host could add, down to `last`."""
        return MatchResult(
            device_prefix_len=sum(map(len, slots)),
            last_device_node=device,
            last_host_node=last,
            best_match_node=last,
            host_hit_length=n_host,
        )

    def path_device_indices(self, node: Node) -> torch.Tensor:
        """The slots of all tokens from the start of the prompt to the end of `node`."""
        slots = []
        while not node.is_root:
            slots.append(device_slots_of(node))
            assert node.parent is not None
            node = node.parent
        nothing: torch.Tensor = self.nothing
        return torch.cat(slots[::-1]) if slots else nothing

    # -- admission ------------------------------------------------------------------------------

    def promise_load(self, req: Req) -> None:
        """Have `req`, which is about to be admitted, count on what would be loaded and no more.

        The scheduler takes a load that brings less than it counted on, but not nothing, for a
        fault; and how much is loaded is a matter of what that costs.
        """
        if req.host_hit_length:
            n_tokens = len(req.origin_input_ids) + len(req.output_ids)
            req.host_hit_length, req.best_match_node = self.plan_load(
                req.best_match_node, n_tokens, req.prefix_len
            )

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Node]:
        """Brings what was promised of a prefix's host part to the device, or nothing.

        Returns (its tokens, its last node), under a lock on its device part. The copy itself
        starts with the batch (`ready_to_load_host_cache`).
        """
        if params.req is not None:
            self.note_loading(params.req)
        slots, last = self.carry_out_load(params.best_match_node)
        return len(slots), last

    # -- prefetching, by handles ----------------------------------------------------------------

    def prefetch_from_storage(
        self,
        handle: CacheRequestHandle,
        last_host_node: Node,
        new_input_tokens: array[int],
        last_hash: str | None = None,
        prefix_keys: list[str] | None = None,
        **of_namespaces: Any,
    ) -> None:
        """of_namespaces: what names the tree, which `last_host_node` is in already."""
        self.prefetch(handle.rid, last_host_node, new_input_tokens)

    def check_prefetch_progress(self, handle: CacheRequestHandle) -> bool:
        done: bool = self.is_prefetched(handle.rid)
        return done

    def pop_prefetch_loaded_tokens(self, handle: CacheRequestHandle) -> int:
        """Not popped: a request that is not admitted now asks again in the next pass."""
        n_tokens: int = self.prefetched_tokens(handle.rid)
        return n_tokens

    def release_aborted_request(self, handle: CacheRequestHandle) -> None:
        self.release_prefetch(handle.rid)

    # -- insertion ------------------------------------------------------------------------------

    def checkpoint(self, req: Req, *, up_to: int) -> None:
        """Whole pages of the KV of the first `up_to` tokens become cache; `req` holds them on."""
        if not req.finished():
            # The array is brought up to date when the next pass is prepared, not at a token.
            self.goes_on(req, has_token=req.extend_end == len(req.full_untruncated_fill_ids))
        if self.is_to_be_cached(req):
            self.note_own(req.kv.cache_protected_len)
            super().checkpoint(req, up_to=up_to)
            self.kept(req, req.last_node, up_to)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """`req` has no slots any more; checkpointed: what filled pages is cached."""
        has_answer = req.finished() and (checkpointed or req.skip_radix_cache_insert)
        self.is_ending(req, is_counted=has_answer)
        is_cached = checkpointed and self.is_to_be_cached(req)
        self.has_ended(req, req.last_node if is_cached else self.root_node)


def salt_of(key: Any) -> str | None:
    """The salt of a RadixKey, if it has one of its own."""
    salt: str | None = key.cache_salt
    return salt


def forget_encoded() -> None:
    """Weights may have changed: what is kept of the encoder's outputs is of others."""
    if mm_schedule.embedding_cache is not None:
        mm_schedule.embedding_cache.clear()


def block_labels(params: CacheInitParams) -> Callable[[TreeKey], Mapping[str, str]]:
    """Of the tree of some blocks, what their events say of it beside hashes.

    A router takes blocks of an adapter for those of the base model unless they have its name. The
    scheduler keeps names by what requests have as `extra_key`, which is our TreeKey. Routers that
    events are in the format of Dynamo for hash salts themselves, and know of no extra keys.
    """

    def labels(key: TreeKey) -> Mapping[str, str]:
        name: str | None = params.kv_event_lora_names.get(key)
        said = {} if name is None else {"lora_name": name}
        if params.dynamo_kv_event_format and key.salt_text and key.extra_key is None:
            said["cache_salt"] = key.salt_text
        return said

    return labels
