"""Upstream's FlashInfer backend, with KV that requests share read once when they decode.

A batch whose plan has levels is attended to in parts: the suffixes by upstream's own decode
wrapper, told to begin after what is shared; the levels by `attention/flashinfer_runner.py`. Such a
batch runs without a CUDA graph, because upstream's graphs hold one decode kernel per layer; so its
plan has to save more than the launches cost (`cascade.EAGER_S`). All others are upstream's alone.

Source of the contract: `sglang/srt/layers/attention/flashinfer_backend.py` (0.5.17). Nothing here
was run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.flashinfer_backend import DecodeMetadata, FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from tiered_kv.attention.flashinfer_runner import KernelShape, can_merge, flashinfer_levels
from tiered_kv.attention.runner import PageTables
from tiered_kv.plugin import cascade_option
from tiered_kv.plugin.cascade import PlannedBatch, make_planner

NAME = "flashinfer"


class CascadeFlashInferBackend(FlashInferAttnBackend):
    """One rank's attention; `cascade` is None where upstream's backend does all by itself."""

    def __init__(self, model_runner: Any, init_new_workspace: bool = False) -> None:
        super().__init__(model_runner, init_new_workspace=init_new_workspace)
        # Upstream checks this for its own class only.
        for phase, name in zip(
            ("prefill", "decode"), model_runner.server_args.get_attention_backends(), strict=True
        ):
            if name == NAME:
                access = self.prefill_kv_access if phase == "prefill" else self.decode_kv_access
                self._check_kv_attention_access(phase, access)
        # Read by the hooks in cascade.py.
        self.cascade = make_planner(model_runner, self._why_not())
        updater = self.indices_updater_decode
        shape = KernelShape(
            n_query_heads=updater.num_qo_heads,
            n_kv_heads=updater.num_kv_heads,
            head_dim=updater.head_dim,
            query_dtype=updater.q_data_type,
            kv_dtype=updater.data_type,
        )
        self._levels = flashinfer_levels(shape, self.workspace_buffer)
        self._is_cascade = False

    def _why_not(self) -> str | None:
        """What of the backend's state cascade attention does not support."""
        updater = self.indices_updater_decode
        if self.dispatch_reason is not None:
            return "models with layers of several kinds of attention"
        if self.is_dllm_model:
            return "diffusion language models"
        if self.is_nvfp4_kvcache or self.decode_uses_dequant_workspace:
            return "a KV cache in FP4"
        if not can_merge(updater.num_qo_heads, updater.head_dim, updater.q_data_type.itemsize):
            return f"{updater.num_qo_heads} query heads on a rank, more than can be merged"
        return None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        planned = None if self.cascade is None else self.cascade.take()
        self._is_cascade = (
            planned is not None
            and bool(planned.plan.levels)
            and forward_batch.seq_lens_cpu is not None
            and len(planned.n_tokens) == len(forward_batch.req_pool_indices)
        )
        if planned is not None and self._is_cascade:
            self._plan_cascade(planned, forward_batch)
        else:
            super().init_forward_metadata(forward_batch)

    def _plan_cascade(self, planned: PlannedBatch, forward_batch: Any) -> None:
        plan, rows = planned.plan, forward_batch.req_pool_indices
        slots = self.req_to_token_pool.req_to_token
        levels = self._levels
        if not levels.holds(plan):
            levels.plan(plan, PageTables(slots, rows, planned.n_tokens))
        shared_cpu = torch.tensor(plan.shared_tokens, dtype=torch.int64)
        own_cpu = torch.tensor(planned.n_tokens, dtype=torch.int64) - shared_cpu
        if levels.order is not None:
            rows = rows[levels.order]
            in_order = torch.tensor(plan.order)
            shared_cpu, own_cpu = shared_cpu[in_order], own_cpu[in_order]
        shared, own = (t.to(rows.device, non_blocking=True) for t in (shared_cpu, own_cpu))
        self.indices_updater_decode.call_begin_forward(
            self.decode_wrappers[0],
            rows,
            own,
            int(own_cpu.sum()),
            self.kv_indptr[0],
            shared,
            None,
            own_cpu,
        )
        self.forward_metadata = DecodeMetadata(self.decode_wrappers)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """[requests, query heads x head size], as upstream's returns it."""
        if not self._is_cascade:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        pool = self.token_to_kv_pool
        if k is not None and save_kv_cache:
            where = KVWriteLoc(forward_batch.out_cache_loc, None)
            pool.set_kv_buffer(layer, where, k, v, *self._kv_write_scales(layer))
        kv_cache = pool.get_kv_buffer(layer.layer_id)
        options = {
            "sm_scale": layer.scaling,
            "logits_soft_cap": layer.logit_cap,
            "k_scale": layer.k_scale_float,
            "v_scale": layer.v_scale_float,
        }
        query = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        order = self._levels.order
        if order is not None:
            query = query[order]
        output, lse = self.decode_wrappers[0].forward_return_lse(query, kv_cache, **options)
        self._levels.merge_into(output, lse, query, kv_cache, **options)
        if order is not None:
            in_batch_order = torch.empty_like(output)
            in_batch_order[order] = output
            output = in_batch_order
        return output.view(-1, layer.tp_q_head_num * layer.head_dim)


def register() -> None:
    """Have upstream build this backend where `flashinfer` and cascade attention are asked for.

    Under that name, because upstream tells what a backend can do by it.
    """
    upstreams: Callable[[Any], Any] = attention_registry.ATTENTION_BACKENDS[NAME]
    if getattr(upstreams, "is_ours", False):
        return

    def create(model_runner: Any) -> Any:
        if not cascade_option.is_wanted(model_runner.server_args):
            return upstreams(model_runner)
        if model_runner.use_mla_backend or model_runner.is_draft_worker:
            make_planner(model_runner)  # says why there is none
            return upstreams(model_runner)
        return CascadeFlashInferBackend(model_runner, model_runner.init_new_workspace)

    create.is_ours = True  # type: ignore[attr-defined]
    attention_registry.register_attention_backend(NAME)(create)
