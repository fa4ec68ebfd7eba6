"""Upstream's FlashInfer backend, with KV that requests share read once when they decode.

A batch whose plan has levels is attended to in parts: the suffixes by upstream's own decode
wrapper, told to begin after what is shared; the levels by `attention/flashinfer_runner.py`, or, in
a CUDA graph, by `attention/flashinfer_graph.py`. Which graphs there are, and which pass is replayed
in one, is said in `cascade_graphs.py`. All other batches are upstream's alone.

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

from tiered_kv.attention.flashinfer_graph import (
    GraphLevels,
    example_plan,
    flashinfer_graph_levels,
)
from tiered_kv.attention.flashinfer_runner import (
    FlashInferLevels,
    KernelShape,
    can_merge,
    flashinfer_levels,
)
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.attention.runner import PageTables
from tiered_kv.plugin.attention.cascade import LEVELS_MAX, PlannedBatch, make_planner
from tiered_kv.plugin.attention.graphs import CascadeGraphs
from tiered_kv.plugin.options import cascade as cascade_option
from tiered_kv.plugin.upstream.current import arguments

NAME = "flashinfer"


class CascadeFlashInferBackend(FlashInferAttnBackend):
    """One rank's attention; `cascade` is None where upstream's backend does all by itself."""

    def __init__(self, model_runner: Any, init_new_workspace: bool = False) -> None:
        super().__init__(model_runner, init_new_workspace=init_new_workspace)
        # Upstream checks this for its own class only.
        for phase, name in zip(
            ("prefill", "decode"),
            arguments.attention_backends(model_runner.server_args),
            strict=True,
        ):
            if name == NAME:
                access = self.prefill_kv_access if phase == "prefill" else self.decode_kv_access
                self._check_kv_attention_access(phase, access)
        # Read by the hooks in cascade.py and cascade_graphs.py.
        self.cascade = make_planner(model_runner, self._why_not())
        self.cascade_graphs: CascadeGraphs | None = None
        updater = self.indices_updater_decode
        self._shape = KernelShape(
            n_query_heads=updater.num_qo_heads,
            n_kv_heads=updater.num_kv_heads,
            head_dim=updater.head_dim,
            query_dtype=updater.q_data_type,
            kv_dtype=updater.data_type,
        )
        self._eager_levels = flashinfer_levels(self._shape, self.workspace_buffer)
        self._parts: tuple[Any, FlashInferLevels | GraphLevels] | None = None
        """The decode wrapper for the suffixes and the levels; None if upstream attends."""

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

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None
    ) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf)
        if self.cascade is not None:
            slots_max = self.token_to_kv_pool.size
            maker = flashinfer_graph_levels(
                self._shape, self.workspace_buffer, slots_max, LEVELS_MAX
            )
            graphs = self.cascade_graphs = CascadeGraphs(maker)
            self.cascade.has_graph = lambda plan: graphs.levels_for(plan) is not None

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a graph is captured or replayed; the batch is padded to the graph's rows."""
        graphs, n_rows = self.cascade_graphs, forward_batch.batch_size
        levels = graphs.capturing if in_capture and graphs is not None else None
        if levels is not None:
            n_tokens = (levels.n_levels + 1,) * n_rows
            planned = PlannedBatch(example_plan(n_rows, levels.n_levels), n_tokens, is_new=True)
        elif graphs is not None and not in_capture:
            assert self.cascade is not None
            current = self.cascade.current
            if current is not None:
                levels, planned = graphs.levels_for(current.plan), current
        if levels is None:
            self._parts = None
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        self._plan_graph(levels, planned, forward_batch)

    def _plan_graph(self, levels: GraphLevels, planned: PlannedBatch, forward_batch: Any) -> None:
        n_rows = levels.n_rows
        fill = self.get_cuda_graph_seq_len_fill_value()
        n_tokens = (*planned.n_tokens, *(fill,) * (n_rows - len(planned.n_tokens)))
        rows = forward_batch.req_pool_indices[:n_rows]
        slots = self.req_to_token_pool.req_to_token
        assert self.cascade_graphs is not None
        tables = PageTables(slots, rows, n_tokens)
        plan = self.cascade_graphs.plan(planned.plan, levels, tables)
        wrapper = self.decode_cuda_graph_metadata[n_rows][0]
        self._plan_suffixes(wrapper, plan, n_tokens, rows, levels.order)
        self._parts = wrapper, levels

    def init_forward_metadata(self, forward_batch: Any) -> None:
        planned = None if self.cascade is None else self.cascade.take()
        if (
            planned is not None
            and planned.plan.levels
            and forward_batch.seq_lens_cpu is not None
            and len(planned.n_tokens) == len(forward_batch.req_pool_indices)
        ):
            self._plan_eager(planned, forward_batch.req_pool_indices)
        else:
            self._parts = None
            super().init_forward_metadata(forward_batch)

    def _plan_eager(self, planned: PlannedBatch, rows: torch.Tensor) -> None:
        levels, wrapper = self._eager_levels, self.decode_wrappers[0]
        if not levels.holds(planned.plan):
            slots = self.req_to_token_pool.req_to_token
            levels.plan(planned.plan, PageTables(slots, rows, planned.n_tokens))
        self._plan_suffixes(wrapper, planned.plan, planned.n_tokens, rows, levels.order)
        self._parts = wrapper, levels

    def _plan_suffixes(
        self,
        wrapper: Any,
        plan: CascadePlan,
        n_tokens: tuple[int, ...],
        rows: torch.Tensor,
        order: torch.Tensor | None,
    ) -> None:
        shared_cpu = torch.tensor(plan.shared_tokens, dtype=torch.int64)
        own_cpu = torch.tensor(n_tokens, dtype=torch.int64) - shared_cpu
        if order is not None:
            rows = rows[order]
            in_order = torch.tensor(plan.order)
            shared_cpu, own_cpu = shared_cpu[in_order], own_cpu[in_order]
        shared, own = (t.to(rows.device, non_blocking=True) for t in (shared_cpu, own_cpu))
        self.indices_updater_decode.call_begin_forward(
            wrapper, rows, own, int(own_cpu.sum()), self.kv_indptr[0], shared, None, own_cpu
        )
        self.forward_metadata = DecodeMetadata([wrapper])

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
        if self._parts is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        wrapper, levels = self._parts
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
        order = levels.order
        if order is not None:
            query = query[order]
        output, lse = wrapper.forward_return_lse(query, kv_cache, **options)
        levels.merge_into(output, lse, query, kv_cache, **options)
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
