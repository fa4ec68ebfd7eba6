"""The prefix cache of models some of whose layers have recurrent state.

A prefix ends where a checkpoint of its state can be had (`memory/checkpoints.py`): KV below that is
of no use. A request gets a copy of the checkpoint into its own slot when it is admitted, and leaves
checkpoints where a chunk of its prompt ends at a page's end, and at the last multiple of
`interval` that its answer passes. SGLang runs such models without overlap here ("no_buffer"), so
that a state is what the last pass made of it whenever this is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult

from tiered_kv.forest.node import Node
from tiered_kv.memory.ticket import path_up
from tiered_kv.plugin.cache.placed_cache import PlacedPrefixCache
from tiered_kv.plugin.upstream.current import request_kv
from tiered_kv.tiers.recurrent import RecurrentStates

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from tiered_kv.plugin.cache.parts import CacheParts

#: Where a prompt left what the tree knows of it, by request: others will leave it there, too.
_PARTING = "tiered_kv_parting"


class HybridPrefixCache(PlacedPrefixCache):
    """interval: tokens between checkpoints within a prompt, at least; whole pages."""

    def __init__(
        self, params: CacheInitParams, parts: CacheParts, states: RecurrentStates, interval: int
    ) -> None:
        super().__init__(params, parts, states)
        self.states = states
        self.interval = interval

    def looked_up(self, req: Req, path: list[Node]) -> None:
        setattr(req, _PARTING, path[-1].end if path else 0)

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
        record, n_tokens = request_kv.state_record(req), request_kv.prefix_tokens(req)
        if record.mamba_needs_clear and n_tokens:
            self.states.give(req.rid, n_tokens, int(record.mamba_pool_idx))
            record.mamba_needs_clear = False

    def passed(self, batch: Any) -> None:
        """A pass was launched that decodes; every state is one token further."""
        for req in batch.reqs:
            n_tokens = request_kv.committed_tokens(req)
            if n_tokens % self.interval == 0 and self.is_to_be_cached(req):
                slot = int(request_kv.state_record(req).mamba_pool_idx)
                self.states.note(req.rid, n_tokens, slot)

    def kept(self, req: Req, last: Node, n_tokens: int) -> None:
        super().kept(req, last, n_tokens)
        is_lasting = self.is_lasting(last)
        path = list(path_up(last))[::-1]
        self.states.name_noted(req.rid, path, is_lasting=is_lasting)
        # Less is kept than was computed where an answer's thoughts are left out.
        if 0 < last.end == n_tokens == request_kv.committed_tokens(req):
            slot = int(request_kv.state_record(req).mamba_pool_idx)
            self.states.take(last.last_page_hash, slot, is_lasting=is_lasting)

    def has_ended(self, req: Req, last: Node) -> None:
        super().has_ended(req, last)
        self.states.forget_noted(req.rid)
        if request_kv.state_record(req).mamba_pool_idx is not None:
            self.req_to_token_pool.free_mamba_cache(req)

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
