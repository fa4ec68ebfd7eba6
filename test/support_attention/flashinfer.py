"""Stand-ins for FlashInfer's wrappers: what its documentation says, in torch, on any device.

They check what they are given as strictly as the kernels, which do not check, rely on it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

EMPTY_LSE = -5e4
"""What FlashInfer's kernel returns where there are no keys."""


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, heads, size] over [tokens, KV heads, size]: the output, and the LSE to the base 2."""
    n_sharing = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(n_sharing, 1) for t in (keys, values))
    scores = torch.einsum("rhd,thd->rht", query, keys) * scale
    lse = torch.logsumexp(scores, -1) / math.log(2)
    return torch.einsum("rht,thd->rhd", torch.softmax(scores, -1), values), lse


class PagedPrefill:
    """As `BatchPrefillWithPagedKVCacheWrapper` on pages of one token."""

    n_plans = 0

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        **options: Any,
    ) -> None:
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert tensor.dtype == torch.int32
        assert page_size == 1
        assert not options["causal"]
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1 > 1
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        # flashinfer.page.get_seq_lens
        pages = torch.clamp(paged_kv_indptr.diff() - 1, min=0)
        self.lengths = pages * page_size + paged_kv_last_page_len
        self.n_plans += 1
        self.queries, self.starts, self.slots = qo_indptr, paged_kv_indptr, paged_kv_indices

    def forward_return_lse(
        self, query: torch.Tensor, kv_cache: Any, *, causal: bool, sm_scale: float, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not causal
        assert self.queries[-1] == len(query)
        output, lse = (
            torch.zeros_like(query),
            torch.full(query.shape[:2], EMPTY_LSE, dtype=query.dtype),
        )
        for i, length in enumerate(self.lengths.tolist()):
            rows = slice(int(self.queries[i]), int(self.queries[i + 1]))
            slots = self.slots[self.starts[i] : self.starts[i] + length].long()
            if length:
                output[rows], lse[rows] = attend(
                    query[rows], kv_cache[0][slots], kv_cache[1][slots], sm_scale
                )
        return output, lse


def merge_in_place(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:
    rows = torch.ones(len(v), dtype=torch.bool) if mask is None else mask
    assert rows.dtype == torch.bool
    top = torch.maximum(s, s_other)
    a, b = torch.exp2(s - top)[..., None], torch.exp2(s_other - top)[..., None]
    v[rows] = ((v * a + v_other * b) / (a + b))[rows]
    s[rows] = (top + torch.log2(a + b)[..., 0])[rows]


class PagedDecode:
    """As `BatchDecodeWithPagedKVCacheWrapper`, planned with the slots of each row."""

    def __init__(self) -> None:
        self.slots: list[torch.Tensor] = []

    def forward_return_lse(
        self, query: torch.Tensor, kv_cache: Any, *, sm_scale: float, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(query) == len(self.slots)
        parts = [
            attend(query[i : i + 1], kv_cache[0][slots], kv_cache[1][slots], sm_scale)
            for i, slots in enumerate(self.slots)
        ]
        return torch.cat([output for output, _ in parts]), torch.cat([lse for _, lse in parts])
