"""SGLang's CUDA graph runner and our FlashInfer backend without a GPU, over one batch's KV.

The runner's capturing, padding and replaying are SGLang's code; graphs record and repeat tensor
operations (`support_attention/graph.py`), kernels are stand-ins, and the model is one layer of
attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner import decode_cuda_graph_runner
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from support_attention.batches import Batch
from support_attention.graph import GraphDecode, GraphPrefill, RecordedGraph, merge_in_graph
from tiered_kv.attention.flashinfer_graph import GraphLevelsMaker
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.plugin.attention import flashinfer as cascade_flashinfer
from tiered_kv.plugin.attention import graphs as cascade_graphs
from tiered_kv.plugin.attention.cascade import PlannedBatch
from tiered_kv.plugin.attention.flashinfer import CascadeFlashInferBackend

SIZES = [1, 2, 4, 8, 16]

#: What of the runner's is switched off.
OFF = (
    "ragged_verify_mode",
    "disable_padding",
    "is_encoder_decoder",
    "is_dllm",
    "enable_two_batch_overlap",
    "enable_pdmux",
    "require_mlp_tp_gather",
    "require_mlp_sync",
    "require_gathered_buffer",
)


class FullCudaGraphBackend:
    """As SGLang's, on recorded operations."""

    def __init__(self) -> None:
        self.graphs: dict[ShapeKey, RecordedGraph] = {}
        self.replayed: list[ShapeKey] = []

    def capture_one(self, key: ShapeKey, forward: Callable[[], Any], **options: Any) -> None:
        for _ in range(2):
            forward()
        self.graphs[key] = RecordedGraph()
        self.graphs[key].capture(forward)

    def replay_session(self) -> Any:
        return contextlib.nullcontext()

    def can_run(self, forward_batch: Any, key: ShapeKey) -> bool:
        return key in self.graphs

    def replay(self, key: ShapeKey, forward_batch: Any) -> LogitsProcessorOutput:
        self.replayed.append(key)
        return LogitsProcessorOutput(next_token_logits=self.graphs[key].replay())


class Updater:
    """As SGLang's `FlashInferIndicesUpdaterDecode`, in torch; `update` as for one wrapper."""

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots = slots

    def update(
        self, rows: torch.Tensor, n: torch.Tensor, n_cpu: Any, n_sum: int, **options: Any
    ) -> None:
        wrapper = options["decode_wrappers"][0]
        self.call_begin_forward(wrapper, rows, n, n_sum, None, torch.zeros_like(n), None, n_cpu)

    def call_begin_forward(
        self,
        wrapper: GraphDecode,
        req_pool_indices: torch.Tensor,
        paged_kernel_lens: torch.Tensor,
        paged_kernel_lens_sum: int,
        kv_indptr: Any,
        kv_start_idx: torch.Tensor,
        spec_info: None,
        seq_lens_cpu: torch.Tensor,
    ) -> None:
        assert paged_kernel_lens_sum == paged_kernel_lens.sum()
        assert torch.equal(seq_lens_cpu.long(), paged_kernel_lens.long())
        wrapper.plan_rows(
            [
                self.slots[row, start : start + n]
                for row, start, n in zip(
                    req_pool_indices, kv_start_idx, paged_kernel_lens, strict=True
                )
            ]
        )


class Rig:
    """A backend and SGLang's runner over one batch's KV; the model is one layer of attention."""

    def __init__(self, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batch = batch
        self.n_heads, self.head_dim = batch.query.shape[1:]
        self.planner = SimpleNamespace(current=None, has_graph=None)
        slots = batch.tables.slots

        def create_decode_wrappers(backend: Any, bs: int, n_tokens: int) -> list[GraphDecode]:
            return [GraphDecode(bs, bs * slots.shape[1])]

        def make_levels(shape: Any, workspace: Any, slots_max: int, n: int) -> GraphLevelsMaker:
            cpu = torch.device("cpu")
            return GraphLevelsMaker(shape, slots_max, n, GraphPrefill, merge_in_graph, cpu)

        theirs = FlashInferAttnBackend
        monkeypatch.setattr(theirs, "_create_decode_wrappers", create_decode_wrappers)
        monkeypatch.setattr(theirs, "init_cuda_graph_state", lambda *args: None)
        monkeypatch.setattr(
            flashinfer_backend, "fast_decode_plan", lambda *args: None, raising=False
        )
        monkeypatch.setattr(cascade_flashinfer, "flashinfer_graph_levels", make_levels)
        self.backend = self._backend(slots)
        self.backend.init_cuda_graph_state(SIZES[-1], SIZES[-1])
        self.runner = self._runner(monkeypatch)

    def _backend(self, slots: torch.Tensor) -> Any:
        backend = object.__new__(CascadeFlashInferBackend)
        batch = self.batch
        pool = SimpleNamespace(
            size=len(batch.keys),
            set_kv_buffer=lambda *args: None,
            get_kv_buffer=lambda layer_id: (batch.keys, batch.values),
        )
        for name, value in {
            "cascade": self.planner,
            "cascade_graphs": None,
            "_parts": None,
            "_shape": batch.kernel_shape(),
            "workspace_buffer": None,
            "req_to_token_pool": SimpleNamespace(req_to_token=slots),
            "token_to_kv_pool": pool,
            "indices_updater_decode": Updater(slots),
            "decode_cuda_graph_metadata": {},
            "disable_cuda_graph_kv_split": False,
            "use_sliding_window_kv_pool": False,
            "decode_uses_dequant_workspace": False,
            "dispatch_reason": None,
            "num_wrappers": 1,
            "kv_indptr": [torch.zeros(32, dtype=torch.int32)],
            "kv_cache_quant_method": SimpleNamespace(needs_global_scale=lambda: True),
        }.items():
            setattr(backend, name, value)
        return backend

    def _runner(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """SGLang's runner with what the parts that run here need, and nothing else."""
        runner = object.__new__(DecodeCudaGraphRunner)
        big, dtype = SIZES[-1], self.batch.query.dtype
        self.query = torch.zeros(big, self.n_heads * self.head_dim, dtype=dtype)
        self.buffers = SimpleNamespace(
            input_ids=torch.zeros(big, dtype=torch.int64),
            positions=torch.zeros(big, dtype=torch.int64),
            req_pool_indices=torch.zeros(big, dtype=torch.int64),
            seq_lens=torch.ones(big, dtype=torch.int64),
            seq_lens_cpu=torch.ones(big, dtype=torch.int64),
            mamba_track_indices=None,
        )
        for name, value in {
            "model_runner": model_runner_with(self.backend),
            "attn_backend": self.backend,
            "backend": FullCudaGraphBackend(),
            "buffers": self.buffers,
            "buffer_registry": SimpleNamespace(fill_from=self._fill),
            "capture_bs": SIZES,
            "max_bs": big,
            "captured_req_width": 1,
            "capture_forward_mode": ForwardMode.DECODE,
            "capture_hidden_mode": 0,
            "seq_len_fill_value": 1,
            "pp_size": 1,
            "tbo_plugin": SimpleNamespace(capture_one_batch_size=lambda *args, **kwargs: None),
            "deepep_adapter": SimpleNamespace(capture=lambda **kwargs: None, replay=lambda: None),
            "device_module": SimpleNamespace(Event=lambda: SimpleNamespace(record=lambda: None)),
            **dict.fromkeys(OFF, False),
            "capture_prepare": self._capture_prepare,
        }.items():
            setattr(runner, name, value)
        for name in ("maybe_flashinfer_autotune_speculative_draft", "set_dp_buffer_len"):
            monkeypatch.setattr(decode_cuda_graph_runner, name, lambda *args, **kwargs: None)
        for method, hook in {
            "can_run_graph": cascade_graphs.may_run_graph,
            "capture_one_shape": cascade_graphs.capture_variants,
            "_resolve_lora_variant": cascade_graphs.variant_of_pass,
        }.items():
            original = getattr(DecodeCudaGraphRunner, method)
            setattr(runner, method, partial(hook, original, runner))
        return runner

    def _batch_view(self, n: int, **fields: Any) -> Any:
        view = {name: value[:n] for name, value in vars(self.buffers).items() if value is not None}
        return SimpleNamespace(
            **view
            | {
                "batch_size": n,
                "forward_mode": ForwardMode.DECODE,
                "seq_lens_sum": n,
                "encoder_lens": None,
                "spec_info": None,
                "lora_ids": None,
                "out_cache_loc": torch.zeros(n, dtype=torch.int64),
                "global_dp_buffer_len": None,
                "global_num_tokens_cpu": None,
                "dp_padding_mode": SimpleNamespace(is_max_len=lambda: True),
            }
            | fields
        )

    def _capture_prepare(self, size: int, **options: Any) -> tuple[Any, Any, None]:
        return self._batch_view(size), self.backend, None

    def _fill(self, forward_batch: Any, *, raw_bs: int, padded_bs: int, **options: Any) -> None:
        """As the registry: what is padding has one token of context, in row 0."""
        for name, padding in (("req_pool_indices", 0), ("seq_lens", 1), ("seq_lens_cpu", 1)):
            buffer = getattr(self.buffers, name)
            buffer[:raw_bs] = getattr(forward_batch, name)
            buffer[raw_bs:padded_bs] = padding

    def model(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        layer = SimpleNamespace(
            layer_id=0,
            tp_q_head_num=self.n_heads,
            head_dim=self.head_dim,
            scaling=self.batch.scale,
            logit_cap=0.0,
            k_scale_float=None,
            v_scale_float=None,
            is_cross_attention=False,
            sliding_window_size=None,
        )
        query = self.query[: forward_batch.batch_size]
        return self.backend.forward_decode(query, None, None, layer, forward_batch)

    def capture(self) -> list[ShapeKey]:
        for size in reversed(SIZES):
            self.runner.capture_one_shape(size, self.model, None, None)
        return list(self.runner.backend.graphs)

    def decode(self, plan: CascadePlan) -> torch.Tensor | None:
        """A pass of the batch; None if it may not run in a graph."""
        batch, n = self.batch, plan.n_rows
        self.planner.current = PlannedBatch(plan, batch.tables.n_tokens, is_new=True)
        lengths = torch.tensor(batch.tables.n_tokens)
        forward_batch = self._batch_view(
            n,
            req_pool_indices=batch.tables.table_rows,
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            seq_lens_sum=int(lengths.sum()),
            capture_hidden_mode=0,
            replace_embeds=None,
            needs_forward_metadata_init=lambda: True,
        )
        if not self.runner.can_run_graph(forward_batch):
            return None
        self.query[:n] = batch.query.flatten(1)
        output = self.runner.execute(forward_batch)
        return output.next_token_logits.view(batch.query.shape).clone()


def model_runner_with(backend: Any) -> Any:
    """What the graph runner reads of SGLang's model runner."""
    no = dict.fromkeys(("is_ngram", "is_dflash_family", "is_eagle"), lambda: False)
    return SimpleNamespace(
        attn_backend=backend,
        server_args=SimpleNamespace(debug_cuda_graph=False),
        spec_algorithm=SimpleNamespace(**no),
        is_draft_worker=False,
        hisparse_coordinator=None,
        canary_manager=None,
        capture_tail_hooks=[],
        device_timer=None,
    )
