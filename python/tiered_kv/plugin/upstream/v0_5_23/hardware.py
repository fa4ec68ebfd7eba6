"""What SGLang 0.5.23 asks of a platform, and where its attention and its weights are hooked."""

from __future__ import annotations

from typing import Any

#: The attention backends that read shared KV once, by device. FlashInfer's is written for 0.5.17:
#: here its slots come from a plan that the scheduler makes (mem_cache/kv_loc_plan.py).
CASCADE_BACKENDS = {"cpu": "torch_native"}


class PlainPlatform:
    """What a platform without kernels of its own must say: nothing.

    SGLang takes a platform's `capabilities` for none unless it says otherwise, and then brings
    pools and allocators in plain torch.
    """


def core_shares(server_args: Any) -> int:
    """Among how many the cores are shared out: all ranks of all replicas."""
    return int(server_args.tp_size * server_args.dp_size)


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
