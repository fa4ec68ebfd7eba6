"""Attention over a cached prefix on a CPU, at the cost of the new tokens alone.

Upstream's `torch_native` backend knows only top-left causal masks: to extend a cached prefix it
pads the queries to the whole sequence with uninitialised memory, computes those rows too, and
throws them away. That costs a cached prefix nearly as much attention as an uncached one, and up to
40 times more where the memory happens to hold denormal floats. The subclass here gives the kernel
the new queries and a mask. The rows it returns are upstream's.

Source of the contract: `sglang/srt/layers/attention/torch_native_backend.py` (0.5.17).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention

#: Queries of one kernel call over a prefix. More would mask more keys that no query may see, and
#: the mask grows with it: 4 bytes x 512 x the longest context (256 MiB at 128k tokens).
BLOCK_QUERIES = 512


class LowerRightMask:
    """Additive causal masks in which the last query sees the last key, as views of one tensor."""

    def __init__(self) -> None:
        self._mask = torch.empty(0, 0)

    def view(self, n_queries: int, n_keys: int, dtype: torch.dtype) -> torch.Tensor:
        """[n_queries, n_keys]: 0 where query i may see key j <= n_keys - n_queries + i, else -inf.

        n_queries: at most BLOCK_QUERIES.
        """
        mask = self._mask
        if mask.dtype is not dtype or mask.shape[1] < n_keys:
            width = max(BLOCK_QUERIES, 1 << (n_keys - 1).bit_length())
            mask = torch.full((BLOCK_QUERIES, width), float("-inf"), dtype=dtype)
            self._mask = mask.triu_(width - BLOCK_QUERIES + 1)
        return mask[BLOCK_QUERIES - n_queries :, mask.shape[1] - n_keys :]


class CpuAttentionBackend(TorchNativeAttnBackend):
    """`torch_native` without redundant rows; what it has no shortcut for, upstream computes."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._mask = LowerRightMask()

    def _run_sdpa_forward_extend(  # noqa: PLR0913, PLR0917 - upstream's signature
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        """Fill and return `output`, as upstream's does.

        query, output: [new tokens, query heads, head size]; caches: [slots, KV heads, head size].
        """
        if not causal or encoder_lens is not None or sliding_window_size is not None:
            return super()._run_sdpa_forward_extend(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling,
                enable_gqa,
                causal,
                is_cross_attn,
                sliding_window_size,
            )
        start = 0
        rows = zip(
            req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True
        )
        for row, n_keys, n_new in rows:
            slots = req_to_token[row, :n_keys]
            own = slice(start, start + n_new)
            self._attend(
                query[own], output[own], k_cache[slots], v_cache[slots], scaling, enable_gqa
            )
            start += n_new
        return output

    def _attend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        enable_gqa: bool,
    ) -> None:
        """One sequence: its last `len(query)` tokens attend to all of its `len(keys)`."""
        n_new, n_keys = len(query), len(keys)
        # The kernel takes [1, heads, tokens, head size]; a cache may hold another dtype.
        query = query.movedim(0, 1)[None]
        keys = keys.to(query.dtype).movedim(0, 1)[None]
        values = values.to(query.dtype).movedim(0, 1)[None]
        # Without a prefix the kernel's own mask is right, and skips the keys that nobody sees.
        has_prefix = n_new < n_keys
        step = BLOCK_QUERIES if has_prefix else n_new
        for begin in range(0, n_new, step):
            end = min(begin + step, n_new)
            seen = n_keys - n_new + end
            mask = self._mask.view(end - begin, seen, query.dtype) if has_prefix else None
            attended = scaled_dot_product_attention(
                query[:, :, begin:end],
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask,
                is_causal=not has_prefix,
                scale=scaling,
                enable_gqa=enable_gqa,
            )
            output[begin:end] = attended[0].movedim(1, 0)


def register() -> None:
    """Have upstream build this backend where `torch_native` is asked for.

    Under that name, because upstream treats names that it doesn't know as GPU backends.
    """
    attention_registry.register_attention_backend("torch_native")(CpuAttentionBackend)
