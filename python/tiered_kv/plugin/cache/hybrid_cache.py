"""The prefix cache of models some of whose layers have recurrent state.

A prefix ends where a checkpoint of its state can be had (`memory/checkpoints.py`): KV below that is
of no use. A request gets a copy of the checkpoint into its own slot when it is admitted, and leaves
checkpoints where a chunk of its prompt ends at a page's end, and at the last multiple of
`interval` that its answer passes. SGLang runs such models without overlap here ("no_buffer"), so
that a state is what the last pass made of it whenever this is called.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    MatchResult,
)

from tiered_kv.forest.node import Node
from tiered_kv.memory.checkpoints import Boundary
from tiered_kv.memory.ticket import path_up, usable
from tiered_kv.plugin.cache.prefix_cache import WRITE_OUT_TIMEOUT_S, TieredPrefixCache
from tiered_kv.tiers.context import device_slots_of
from tiered_kv.tiers.recurrent import RecurrentStates

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from tiered_kv.plugin.cache.parts import CacheParts

#: Where a prompt left what the tree knows of it, by request: others will leave it there, too.
_PARTING = "tiered_kv_parting"


class HybridPrefixCache(TieredPrefixCache):
    """interval: tokens between checkpoints within a prompt, at least; whole pages."""

    def __init__(
        self, params: CacheInitParams, parts: CacheParts, states: RecurrentStates, interval: int
    ) -> None:
        self._states: RecurrentStates | None = None
        super().__init__(params, parts)
        self.states = self._states = states
        self.interval = interval
        self._admitting: Req | None = None
        self._prompts: dict[str, tuple[Node, array[int]]] = {}
        """Of those who wait for a checkpoint on disk: their tree, and their whole prompt."""

    # -- lookup -------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """As far as a state can be had, if it is for a request; else all that there is."""
        req = params.req
        if req is None:
            return super().match_prefix(params)
        if not self.weights.is_named:
            self.look_at_weights()
        key, hierarchy = params.key, self.hierarchy
        self._last_key = key.extra_key
        root, tokens = self._root_of(key), self._named(key)
        path, device_end, end = self._usable(root, tokens, key.limit)
        setattr(req, _PARTING, path[-1].end if path else 0)
        place = self.states.deepest(path, end)
        on_device = place
        if place is not None and place.n_tokens > device_end:
            on_device = self.states.deepest(path, device_end)
        self.states.promise(req.rid, {one for one in (place, on_device) if one is not None})
        first = hierarchy.match(root, tokens, _tokens(on_device))
        if on_device == place:
            last = first.last_device
        else:
            last = hierarchy.match(root, tokens, _tokens(place)).last
        return self.match_result(
            [device_slots_of(node) for node in first.device],
            first.last_device,
            last,
            _tokens(place) - _tokens(on_device),
        )

    def _usable(
        self, root: Node, tokens: array[int], limit: int | None
    ) -> tuple[list[Node], int, int]:
        """(The path of a prompt, where what the device has of it ends, and the host), in tokens.

        A node in which the prompt ends is split, so that the path is the prompt's.
        """
        found = self.hierarchy.context.forest.peek(root, tokens, limit)
        path = list(found.path)
        if found.partial is not None:
            n_pages = found.common // self.page_size
            path.append(self.hierarchy.context.forest.split(found.partial, n_pages)[0])
        n_device, n_usable = usable(path)
        ends = [0, *(node.end for node in path)]
        return path, ends[n_device], ends[n_usable]

    def note_loading(self, req: Req) -> None:
        super().note_loading(req)
        self._admitting = req

    def load_back(self, last: Node, n_tokens: int | None) -> tuple[torch.Tensor, Node]:
        """All that ends at `last` and is not the request's yet, or nothing: a part has no state."""
        req = self._admitting
        assert req is not None, "SGLang loads for a request"
        start = len(req.prefix_indices)
        if self.hierarchy.load_back.load_whole(last, n_tokens, start) is None:
            return self.nothing, req.last_node
        own = [device_slots_of(node) for node in path_up(last) if node.start >= start]
        return torch.cat(own[::-1]), last

    # -- states -------------------------------------------------------------------------------

    def supports_mamba(self) -> bool:
        return True

    def stop_before(self, req: Req, start: int) -> int | None:
        """Where the chunk of `req` from token `start` on is to end for the sake of a checkpoint.

        That costs a pass, so it must save at least `interval` tokens to whoever goes on from there:
        where the prompt leaves what is known of it, and at its last page.
        """
        n_tokens = len(req.full_untruncated_fill_ids)
        last = n_tokens // self.page_size * self.page_size
        stops = (getattr(req, _PARTING, 0), last)
        return min((s for s in stops if start + self.interval <= s < n_tokens), default=None)

    def seed(self, req: Req) -> None:
        """SGLang has given `req` a slot for its state, which is to begin after its prefix."""
        if req.mamba_needs_clear and len(req.prefix_indices):
            self.states.give(req.rid, len(req.prefix_indices), int(req.mamba_pool_idx))
            req.mamba_needs_clear = False

    def passed(self, batch: Any) -> None:
        """A pass was launched that decodes; every state is one token further."""
        for req in batch.reqs:
            n_tokens = len(req.origin_input_ids) + len(req.output_ids)
            if n_tokens % self.interval == 0 and self.is_to_be_cached(req):
                self.states.note(req.rid, n_tokens, int(req.mamba_pool_idx))

    def cache_unfinished_req(self, req: Req, chunked: bool = False) -> None:
        super().cache_unfinished_req(req, chunked)
        if self.is_to_be_cached(req):
            self._take(req, req.last_node, len(req.get_fill_ids()))

    def cache_finished_req(
        self, req: Req, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
        if is_insert and self.is_to_be_cached(req):
            # Less is handled than was computed where an answer's thoughts are left out.
            is_whole = kv_len_to_handle == req.kv_committed_len
            self._take(req, self.last_inserted, kv_len_to_handle if is_whole else 0)
        self.states.forget_noted(req.rid)
        if req.mamba_pool_idx is not None:
            self.req_to_token_pool.free_mamba_cache(req)

    def _take(self, req: Req, last: Node, n_tokens: int) -> None:
        """`req` has a state after `n_tokens`, and its pages are in the tree down to `last`."""
        is_lasting = self.weights.is_named and last.root.tree_key.is_lasting
        path = list(path_up(last))[::-1]
        self.states.name_noted(req.rid, path, is_lasting=is_lasting)
        if n_tokens and n_tokens == last.end:
            slot = int(req.mamba_pool_idx)
            self.states.take(last.last_page_hash, slot, is_lasting=is_lasting)

    # -- the disk -----------------------------------------------------------------------------

    def prefetch(self, rid: str, last_host_node: Node, new_input_tokens: array[int]) -> None:
        super().prefetch(rid, last_host_node, new_input_tokens)
        self.states.wish(rid)
        tokens = array("q")
        for node in list(path_up(last_host_node))[::-1]:
            tokens.extend(node.tokens)
        # Of names, too: no such model has inputs beside tokens.
        tokens.extend(new_input_tokens)
        self._prompts[rid] = last_host_node.root, tokens

    def is_prefetched(self, rid: str) -> bool:
        if not super().is_prefetched(rid):
            return False
        # While weights change, what the disk has is of others.
        if not self.states.is_wished(rid) or not self.weights.is_named:
            return True
        root, tokens = self._prompts[rid]
        path, _, end = self._usable(root, tokens, None)
        return self.states.has_come(rid, path, end)

    def release_prefetch(self, rid: str) -> None:
        super().release_prefetch(rid)
        self.states.forget_wish(rid)
        self._prompts.pop(rid, None)

    # -- what SGLang counts, and evicts ------------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """Pages only: it has no slots of the pool of states to give."""
        return super().evict(params) if params.num_tokens else EvictResult()

    def full_evictable_size(self) -> int:
        return self.evictable_size()

    def full_protected_size(self) -> int:
        return self.protected_size()

    def mamba_evictable_size(self) -> int:
        """The tree has no slots of the pool of states: those are of requests that run."""
        return 0

    mamba_protected_size = mamba_evictable_size

    def all_mamba_values_flatten(self) -> torch.Tensor:
        return self.nothing

    def sanity_check(self) -> None:
        """Called by an idle scheduler; `check_integrity` is called besides where it is wanted."""

    # -- administration -----------------------------------------------------------------------

    def check_hicache_events(self) -> None:
        self.states.end_promises()
        self.states.poll()
        super().check_hicache_events()

    def reset(self) -> None:
        super().reset()
        if self._states is not None:
            self._states.flush()
            self._prompts.clear()

    def check_integrity(self) -> None:
        super().check_integrity()
        self.states.table.check_integrity()

    def release_host_resources(self) -> None:
        self.states.close(WRITE_OUT_TIMEOUT_S)
        super().release_host_resources()


def _tokens(place: Boundary | None) -> int:
    return 0 if place is None else place.n_tokens
