"""What SGLang 0.5.17 asks of a platform, and where its attention and its weights are hooked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: The attention backends that read shared KV once, by device.
CASCADE_BACKENDS = {"cpu": "torch_native", "cuda": "flashinfer"}

#: What has a branch for SGLang's CPU engine where drafts are made and verified: modules, and the
#: kernels of that (`draft_kernels.py`) by the names that each has for them.
DRAFT_KERNELS: dict[str, dict[str, str]] = {
    "sglang.srt.mem_cache.allocation": {
        "assign_req_to_token_pool_cpu": "assign_req_to_token_pool_cpu"
    },
    "sglang.srt.speculative.spec_utils": {
        "assign_extend_cache_locs_cpu": "assign_extend_cache_locs_cpu"
    },
    "sglang.srt.speculative.eagle_utils": {
        "sgl_build_tree_kernel_efficient_cpu": "build_tree_kernel_efficient_cpu",
        "sgl_verify_tree_greedy_cpu": "verify_tree_greedy_cpu",
    },
    "sglang.srt.speculative.eagle_worker_common": {
        "assign_draft_cache_locs_contiguous_cpu": "assign_draft_cache_locs_contiguous_cpu"
    },
    "sglang.srt.speculative.ngram_worker": {
        "reconstruct_indices_from_tree_mask": "reconstruct_indices_from_tree_mask"
    },
    "sglang.kernels.ops.speculative.cache_locs": {
        "assign_extend_cache_locs_cpu": "assign_extend_cache_locs_cpu"
    },
    "sglang.kernels.ops.speculative.eagle": {
        "fill_accept_out_cache_loc_cpu": "fill_accept_out_cache_loc_cpu",
        "fill_bonus_tokens_cpu": "fill_bonus_tokens_cpu",
    },
}


def prepare_speculation() -> None:
    """SGLang's collection of n-grams is compiled when it is first used, and lacks an include."""
    from sglang.kernels.ops.speculative import ngram_corpus

    compile_ = ngram_corpus.load_jit
    if not isinstance(compile_, functools.partial):
        ngram_corpus.load_jit = functools.partial(compile_, extra_cflags=["-include", "cstddef"])


class PlainPlatform:
    """What a platform without kernels of its own must say."""

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        pool: type = MHATokenToKVPool
        return pool

    def get_mla_kv_pool_cls(self) -> Callable[..., Any]:
        """What makes a pool of upstream's own kind; a class of ours would be another."""
        return mla_kv_pool

    def get_paged_allocator_cls(self) -> type:
        from tiered_kv.plugin.upstream.v0_5_17.cpu_allocator import CpuPagedTokenToKVPoolAllocator

        return CpuPagedTokenToKVPoolAllocator


def mla_kv_pool(*args: Any, index_head_dim: None = None, **kwargs: Any) -> Any:
    """SGLang's pool of MLA's latents.

    index_head_dim: what upstream gives to a platform's pool, and its own does not take; None but
    where attention has an index, for which it asks for a pool of another kind.
    """
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    del index_head_dim
    return MLATokenToKVPool(*args, **kwargs)


def core_shares(server_args: Any) -> int:
    """Among how many the cores are shared out: the ranks of one replica; replicas have the same."""
    return int(server_args.tp_size)


def replica_index(tp_worker: Any) -> int:
    """Which of the data-parallel replicas this process belongs to."""
    return int(tp_worker.ps.dp_rank or 0)


def weights_of(tp_worker: Any) -> object:
    """What tells the weights of this rank from others in the process."""
    return tp_worker


def weights_updated_by(updater: Any) -> object:
    """The same, from the object whose methods `update_weights_from_*` are hooked."""
    return updater


def takes_weights(scheduler: Any, recv_req: Any) -> bool:
    """Whether an update comes to an end: SGLang looks for a draft model where there is none."""
    from sglang.srt.managers import io_struct

    drafts = scheduler.draft_worker
    asks_drafts = isinstance(
        recv_req,
        (io_struct.UpdateWeightFromDiskReqInput, io_struct.UpdateWeightsFromIPCReqInput),
    )
    return drafts is None or drafts.draft_worker is not None or not asks_drafts
