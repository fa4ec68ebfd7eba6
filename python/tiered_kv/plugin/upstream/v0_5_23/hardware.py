"""What SGLang 0.5.23 asks of a platform, and where its attention and its weights are hooked."""

from __future__ import annotations

from typing import Any

#: The attention backends that read shared KV once, by device. FlashInfer's is written for 0.5.17:
#: here its slots come from a plan that the scheduler makes (mem_cache/kv_loc_plan.py).
CASCADE_BACKENDS = {"cpu": "torch_native"}


#: What has a branch for SGLang's CPU engine where drafts are made and verified: modules, and the
#: kernels of that (`draft_kernels.py`) by the names that each has for them.
DRAFT_KERNELS: dict[str, dict[str, str]] = {
    "sglang.srt.mem_cache.allocation": {
        "assign_req_to_token_pool_cpu": "assign_req_to_token_pool_cpu"
    },
    "sglang.srt.speculative.eagle_utils": {},
    "sglang.srt.speculative.ngram_worker": {},
    "sglang.kernels.ops.speculative.cache_locs": {
        "assign_draft_cache_locs_contiguous_cpu": "assign_draft_cache_locs_contiguous_cpu",
        "assign_extend_cache_locs_cpu": "assign_extend_cache_locs_cpu",
    },
    "sglang.kernels.ops.speculative.eagle": {
        "fill_accept_out_cache_loc_cpu": "fill_accept_out_cache_loc_cpu",
        "fill_bonus_tokens_cpu": "fill_bonus_tokens_cpu",
    },
    "sglang.kernels.ops.speculative.reconstruct_tree": {
        "reconstruct_indices_from_tree_mask": "reconstruct_indices_from_tree_mask"
    },
    "sglang.kernels.ops.speculative.spec_tree": {
        "sgl_build_tree_kernel_efficient_cpu": "build_tree_kernel_efficient_cpu",
        "sgl_verify_tree_greedy_cpu": "verify_tree_greedy_cpu",
    },
}


def prepare_speculation() -> None:
    """A pool of a server that speculates compiles a kernel for moving KV as it is made.

    On a CPU it is moved in plain torch, which needs none: as in SGLang's pools for NPUs.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    MHATokenToKVPool._init_kv_copy_and_warmup = _no_kernel_moves


def _no_kernel_moves(self: Any) -> None:
    """In the place of a method, with its parameters: they are verified at the start."""
    self._kv_copy_config = None


class PlainPlatform:
    """What a platform without kernels of its own must say: nothing.

    SGLang takes a platform's `capabilities` for none unless it says otherwise, and then brings
    pools and allocators in plain torch.
    """


def core_shares(server_args: Any) -> int:
    """Among how many the cores are shared out: all ranks of all replicas."""
    return int(server_args.tp_size * server_args.pp_size * server_args.dp_size)


def replica_index(tp_worker: Any) -> int:
    """Which of the data-parallel replicas this process belongs to: the process itself was told."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().dp_rank or 0)


def weights_of(tp_worker: Any) -> object:
    """What tells the weights of this rank from others in the process."""
    return tp_worker.model_runner


def weights_updated_by(updater: Any) -> object:
    """The same, from the object whose methods `update_weights_from_*` are hooked."""
    return updater.get_model_runner()


def takes_weights(scheduler: Any, recv_req: Any) -> bool:
    """Whether an update comes to an end."""
    return True
