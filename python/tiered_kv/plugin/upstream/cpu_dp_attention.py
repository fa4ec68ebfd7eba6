"""DP attention on a CPU: ranks that have requests of their own gather their tokens for each pass.

SGLang puts a rank's tokens among those of all ranks, and takes them out again, with a Triton
kernel, says how many there are through pinned memory, and gathers with operators that are
registered for a GPU. Here the kernel is a copy in torch, memory is as it is, and what the operators
call is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def register() -> None:
    """Put all that into SGLang's modules, in the process that runs the model."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import dp_attention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    for place in ("memcpy_triton", "memcpy_func"):
        if hasattr(dp_attention, place):
            setattr(dp_attention, place, copy_rows)
    GroupCoordinator.all_gather_into_tensor = GroupCoordinator._all_gather_into_tensor
    GroupCoordinator.reduce_scatter_tensor = GroupCoordinator._reduce_scatter_tensor
    prepare: Callable[..., None] = ForwardBatch.prepare_mlp_sync_batch
    if hasattr(prepare, "__wrapped__"):
        return

    @functools.wraps(prepare)
    def prepare_mlp_sync_batch(*args: Any, **kwargs: Any) -> None:
        with _Unpinned():
            prepare(*args, **kwargs)

    ForwardBatch.prepare_mlp_sync_batch = prepare_mlp_sync_batch


class _Unpinned(TorchFunctionMode):
    """No tensor that is made is pinned."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def copy_rows(
    dst: torch.Tensor,
    src: torch.Tensor,
    dim: int,
    offset: torch.Tensor,
    size: torch.Tensor,
    offset_src: bool,
) -> None:
    """Copy `size` rows, from row `offset` of `src` if `offset_src`, else to row `offset` of `dst`.

    dim: 0; offset, size: one number each.
    """
    start, end = int(offset), int(offset) + int(size)
    if offset_src:
        dst[: end - start] = src[start:end]
    else:
        dst[start:end] = src[: end - start]
