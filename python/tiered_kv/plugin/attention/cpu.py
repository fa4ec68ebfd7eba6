"""Attention on a CPU at the cost of what is new: of new tokens, and of KV not read already.

Upstream's `torch_native` backend knows only top-left causal masks: to extend a cached prefix it
pads the queries to the whole sequence with uninitialised memory, computes those rows too, and
throws them away. That costs a cached prefix nearly as much attention as an uncached one, and up to
40 times more where the memory happens to hold denormal floats. The subclass here gives the kernel
the new queries and a mask. The rows it returns are upstream's.

Decoding, with `--tiered-kv-cascade`, reads KV that requests share once for all of them, and every
other row without repeating KV for the heads that share it (`attention/torch_runner.py`).

Source of the contract: `sglang/srt/layers/attention/torch_native_backend.py` (0.5.17).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
    AttnForwardMethod,
)
from torch.nn.functional import scaled_dot_product_attention

from tiered_kv.attention.runner import PageTables
from tiered_kv.attention.torch_runner import TorchCascadeRunner, unshared_groups
from tiered_kv.core.errors import IntegrityError
from tiered_kv.plugin.attention.cascade import PlannedBatch, make_planner
from tiered_kv.plugin.attention.draft_trees import DraftTrees
from tiered_kv.plugin.attention.scores import Scores

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
        # Read by the hooks in cascade.py.
        self.cascade = make_planner(model_runner)
        self._runner = TorchCascadeRunner()
        self._is_prepared = False
        self._trees: DraftTrees | None = None
        self._scores = Scores()
        self._chunk_size = getattr(model_runner, "attention_chunk_size", None)
        self._checks_groups = bool(
            getattr(model_runner.server_args, "tiered_kv_debug_integrity", False)
        )

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._trees = None
        if forward_batch.forward_mode.is_target_verify():
            self._trees = DraftTrees.of(forward_batch)
        planned = None if self.cascade is None else self.cascade.take()
        # ATen's kernel dies where there are no keys, which only rows of padding could have.
        self._is_prepared = (
            planned is not None
            and len(planned.n_tokens) == len(forward_batch.req_pool_indices)
            and min(planned.n_tokens) > 0
        )
        if planned is not None and self._is_prepared:
            self._prepare(planned, forward_batch.req_pool_indices)

    def _prepare(self, planned: PlannedBatch, table_rows: torch.Tensor) -> None:
        slots = self.req_to_token_pool.req_to_token
        tables = PageTables(slots, table_rows, planned.n_tokens)
        if self._checks_groups and planned.is_new:
            wrong = unshared_groups(planned.plan, tables)
            if wrong:
                raise IntegrityError(
                    f"The groups {wrong} of {planned.plan} hold requests that do not share their "
                    "slots; start with --tiered-kv-cascade off and report this."
                )
        self._runner.prepare(planned.plan, tables)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of requests that a batch is filled up with, where ranks have unlike many."""
        return 1

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._scores = self._scores_of(layer, sinks)
        return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._scores = self._scores_of(layer, sinks)
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    def _scores_of(self, layer: Any, sinks: torch.Tensor | None) -> Scores:
        """SGLang calls layers that attend in chunks by what else is theirs in Llama 4."""
        chunk = self._chunk_size if getattr(layer, "use_irope", False) else None
        return Scores(layer.scaling, layer.logit_cap, sinks, chunk)

    def _run_sdpa_forward_decode(  # noqa: PLR0913, PLR0917 - upstream's signature
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        """Fill and return `output`, as upstream's does; one query per request.

        query, output: [requests, query heads, head size]; caches: [slots, KV heads, head size].
        """
        if not self._scores.are_plain:
            tables = req_to_token[req_pool_indices]
            lengths = [(n_keys, 1) for n_keys in seq_lens.tolist()]
            return self._attend_by_scores(
                query, output, k_cache, v_cache, tables, lengths, sliding_window_size
            )
        is_plain = encoder_lens is None and not is_cross_attn and sliding_window_size is None
        if self._is_prepared and is_plain:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return self._runner.run(query, k_cache, v_cache, output, scale)
        return super()._run_sdpa_forward_decode(
            query,
            output,
            k_cache,
            v_cache,
            req_to_token,
            req_pool_indices,
            seq_lens,
            encoder_lens,
            scaling,
            enable_gqa,
            causal,
            is_cross_attn,
            sliding_window_size,
        )

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
        if self._trees is not None:
            return self._trees.attend(
                query,
                output,
                k_cache,
                v_cache,
                [req_to_token[row] for row in req_pool_indices.tolist()],
                scores=replace(self._scores, scaling=scaling),
                window=sliding_window_size,
            )
        if not self._scores.are_plain:
            tables = req_to_token[req_pool_indices]
            lengths = list(zip(seq_lens.tolist(), extend_seq_lens.tolist(), strict=True))
            return self._attend_by_scores(
                query, output, k_cache, v_cache, tables, lengths, sliding_window_size
            )
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

    def _attend_by_scores(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        tables: torch.Tensor,
        lengths: list[tuple[int, int]],
        window: int | None,
    ) -> torch.Tensor:
        """Fill and return `output`. lengths: of each sequence, how many keys and new tokens."""
        start = 0
        for table, (n_keys, n_new) in zip(tables, lengths, strict=True):
            slots, own = table[:n_keys], slice(start, start + n_new)
            output[own] = self._scores.attend_causally(
                query[own], k_cache[slots], v_cache[slots], window
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
    """Have upstream build this backend where `torch_native` or `triton` is asked for.

    Under those names, because upstream treats names that it doesn't know as GPU backends. It takes
    `triton`, which needs a GPU, for some models whatever the device, and serves GPT-OSS and
    Exaone 4 with no other that a CPU could have.
    """
    for name in ("torch_native", "triton"):
        attention_registry.register_attention_backend(name)(CpuAttentionBackend)
        AttentionBackendRegistry.register(name, _attend_to_latents)


def _attend_to_latents(attention: Any, forward_batch: Any) -> AttnForwardMethod:
    """How an MLA layer attends: always to the latents, also where a prompt begins.

    Upstream would expand them into keys and values there, which this backend looks for in the
    pool.
    """
    del attention, forward_batch
    return AttnForwardMethod.MLA
