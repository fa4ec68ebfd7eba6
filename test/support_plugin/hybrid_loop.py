"""SGLang's scheduler loop over a model with recurrent state: a hash of all tokens so far.

In each pass the state of every request must be that of exactly the tokens that its KV says it has;
then it goes on by those that the pass computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from torch import float32, int64

from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.kv_model import KvModel
from tiered_kv.plugin.cache.hybrid_cache import HybridPrefixCache
from tiered_kv.plugin.cache.state_pool import StatePoolCopier
from tiered_kv.tiers.recurrent import RecurrentStates
from tiered_kv.tiers.state_store import StateLayout, StateStore
from tiered_kv.tiers.transfer import Collective, SingleRank


def state_after(state: int, tokens: Iterable[int]) -> int:
    for token in tokens:
        state = (state * 1_000_003 + token + 1) % (1 << 61)
    return state


class HybridModel(KvModel):
    """Beside KV it has a state for each request, in its slot of SGLang's pool."""

    def __init__(self, pool: Any, rows: HybridReqToTokenPool) -> None:
        super().__init__(pool, rows, overlap=False)
        self._rows = rows
        self.n_seeded = 0

    def forward_batch_generation(
        self, batch: Any, pp_proxy_tensors: None = None
    ) -> GenerationBatchResult:
        states = self._rows.mamba_pool.mamba_cache.temporal[0].flatten(1).view(int64)
        is_decode = batch.forward_mode.is_decode()
        if batch.mamba_clear_indices is not None and not is_decode:
            states[batch.mamba_clear_indices] = 0
        assert batch.mamba_cow_src_indices is None, "states come from the host alone"
        result = super().forward_batch_generation(batch)
        if self._gate.has_failed(batch.hicache_consumer_index):
            return result
        slots = self._rows.get_mamba_indices(batch.req_pool_indices).tolist()
        assert len(set(slots)) == len(slots), "two requests share a state"
        for place, (slot, row) in enumerate(zip(slots, self._read(batch), strict=True)):
            before = len(row) - 1 if is_decode else batch.prefix_lens[place]
            state, n_tokens = states[slot].tolist()
            assert n_tokens == before, "a state of another number of tokens"
            assert state == state_after(0, row[:before].tolist()), "a state of other tokens"
            states[slot, 0] = state_after(state, row[before:].tolist())
            states[slot, 1] = len(row)
            self.n_seeded += before > 0 and not is_decode
        return result


class HybridLoop(DecodeLoop):
    """n_states: how many checkpoints the host has room for; collective: of one of several ranks."""

    def __init__(
        self, args: Any, *, n_states: int, collective: Collective | None = None, **options: Any
    ) -> None:
        self._n_states, self._collective = n_states, collective or SingleRank()
        super().__init__(args, overlap=False, **options)

    def make_rows(self, max_running: int) -> HybridReqToTokenPool:
        shape = Mamba2StateShape.create(
            tp_world_size=1, intermediate_size=2, n_groups=1, num_heads=1, head_dim=2,
            state_size=2, conv_kernel=2,
        )  # fmt: skip
        dtype = Mamba2StateDType(conv=float32, temporal=float32)
        return HybridReqToTokenPool(
            size=max_running,
            mamba_size=max_running,
            mamba_spec_state_size=0,
            max_context_len=1024,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Mamba2CacheParams(shape=shape, layers=[0], dtype=dtype),
            mamba_layer_ids=[0],
            enable_mamba_extra_buffer=False,
            enable_overlap_schedule=False,
        )

    def make_model(self, pool: Any, overlap: bool) -> HybridModel:
        return HybridModel(pool, self.req_to_token_pool)

    def make_cache(self, params: Any, parts: Any, disk: PretendDisk | None) -> HybridPrefixCache:
        copier = StatePoolCopier(self.req_to_token_pool.mamba_pool)
        layout = StateLayout(copier.n_bytes)
        store = None
        if disk is not None:
            pages: Any = disk.namespace(bytes(32), layout.part_bytes)
            store = StateStore(pages, layout)
        slots = np.zeros((self._n_states, layout.slot_bytes), np.uint8)
        ranks = parts.hierarchy.context.collective = self._collective
        states = RecurrentStates(copier, layout, slots, store, params.page_size, ranks)
        parts.hierarchy.context.beside = states
        cache = HybridPrefixCache(params, parts, states, 2 * params.page_size)
        self.req_to_token_pool.tiered_kv_cache = cache
        return cache

    def check_nothing_is_held(self) -> None:
        super().check_nothing_is_held()
        pool, states = self.req_to_token_pool, self.tree_cache.states
        assert pool.mamba_allocator.available_size() == pool.mamba_pool.size
        states._queue.wait()
        states.poll()
        states.end_promises()
        states.table.check_integrity()
        assert not states.table._reserved
        assert not states.table._holds
        assert not states._unnamed

    def close(self) -> None:
        self.tree_cache.states.close(1.0)
        super().close()
