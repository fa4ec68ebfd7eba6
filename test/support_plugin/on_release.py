"""What the tests' own scheduler must know of the release of SGLang that is installed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tiered_kv.core.ids import Tier
from tiered_kv.plugin.upstream.current import hardware
from tiered_kv.plugin.upstream.installed import installed

#: Attributes of 0.5.23's `Scheduler` for what does not take part.
_OFF = """
    enable_lmcache enable_unified_cache_external_linker enable_skip_finishing_decode _sched_idled
    enable_continuous_input_polling attn_dp_enabled _event_loop_should_restart
    enable_lora_overlap_loading
"""
_NONE = """
    dynamic_chunk_sizer mm_receiver _pause_started_at _prev_prefill_end_ts _prev_step
    scheduler_stage_metrics idle_sleeper sliding_window_size decode_offload_manager
"""

IS_0_5_17 = installed() == "0.5.17"

reads_shared_kv_on_gpus = pytest.mark.skipif(
    "cuda" not in hardware.CASCADE_BACKENDS,
    reason="no cascade attention through FlashInfer on this release: docs/releases.md",
)


def paged_allocator() -> Any:
    """The class of allocator that the CPU platform uses."""
    if IS_0_5_17:
        from tiered_kv.plugin.upstream.v0_5_17.cpu_allocator import CpuPagedTokenToKVPoolAllocator

        return CpuPagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    return PagedTokenToKVPoolAllocator


def attention_backends(name: str | None) -> dict[str, Any]:
    """What arguments have of their attention backend."""
    if IS_0_5_17:
        return {"get_attention_backends": lambda: (name, name)}
    return {"prefill_attention_backend": name, "decode_attention_backend": name}


def move_prefix(req: Any) -> None:
    """Have a request's prefix lie in other slots, as after it made way and came back."""
    if IS_0_5_17:
        req.prefix_indices = req.prefix_indices.clone()
    else:
        record = req.last_node.records[Tier.DEVICE]
        record.slots = torch.arange(req.last_node.n_tokens)


def resolve(args: Any) -> Any:
    """`args`, resolved: 0.5.17's are from the start, 0.5.23's when the engine starts."""
    getattr(args, "resolve_once", lambda: None)()
    return args


@contextmanager
def no_device_to_wait_for() -> Iterator[None]:
    """0.5.23 waits for CUDA when memory is released, also on a CPU, where that is an error."""
    if torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch, "get_device_module", return_value=torch.cpu):
        yield


def qkv_projection(n_kv_heads: int, n_ranks: int, **sizes: Any) -> Any:
    """SGLang's projection of one of `n_ranks` ranks."""
    from sglang.srt.layers import linear

    sizes |= {"total_num_kv_heads": n_kv_heads, "bias": False}
    if IS_0_5_17:
        return linear.QKVParallelLinear(**sizes, tp_rank=0, tp_size=n_ranks)
    # Not by the process's own topology, which other tests have published.
    group = SimpleNamespace(rank_in_group=0, world_size=n_ranks)
    with mock.patch.object(linear, "_resolve_linear_group", return_value=group):
        return linear.QKVParallelLinear(**sizes)


def publish(args: Any) -> None:
    """Have all of this process go by `args`, as a scheduler of one rank does."""
    if IS_0_5_17:
        from sglang.srt.runtime_context import get_context

        get_context().set_server_args(args)
        return
    from sglang.srt import runtime_context

    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0))


def set_attributes(scheduler: Any) -> None:
    """What SGLang's loop reads of a scheduler on this release alone."""
    if IS_0_5_17:
        return
    for name in _OFF.split():
        setattr(scheduler, name, False)
    for name in _NONE.split():
        setattr(scheduler, name, None)
    scheduler.processed_tokens_counter = scheduler.prefill_decode_interval = 0
    scheduler._prefill_decode_interval_remaining = scheduler.prefill_decode_interval_min_bs = 0
    scheduler._deferred_input_requests, scheduler._pause_intervals = [], deque()
    scheduler.beam_coordinator = scheduler.load_publisher = _Absent()


def of_result_processor(args: Any) -> dict[str, Any]:
    """Parts of `SchedulerBatchResultProcessor` that this release alone has."""
    if IS_0_5_17:
        return {"server_args": args}
    return {"beam_coordinator": _Absent()}


def of_weight_updater() -> dict[str, Any]:
    """Parts of `SchedulerWeightUpdaterManager` that it does not find itself on this release."""
    if IS_0_5_17:
        return {"tp_cpu_group": None}
    from sglang.srt.runtime_context import get_parallel

    group = SimpleNamespace(cpu_group=None, world_size=1)
    get_parallel().override_permanently(tp_group=group)
    return {}


class _Absent:
    """A component that takes any call, does nothing, and has nothing of whatever is counted."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: 0
