"""SGLang's own scheduler loop over real batches, pools and tiers, with `KvModel` as the model.

Of `Scheduler` only `__init__` is replaced: the loop, the queue, admission, retraction, the handling
of results are SGLang's. What it would tell other processes is swallowed.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers import scheduler as upstream
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)
from sglang.srt.managers.scheduler_components.dp_attn import SchedulerDPAttnAdapter
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from support.tiny_llama import write_config
from support_plugin import on_release
from support_plugin.kv_model import VOCABULARY, KvModel
from support_plugin.serving_parts import PretendDisk, serving_parts
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.plugin.cache.device_pool import DeviceBuffers
from tiered_kv.plugin.cache.parts import CacheParts
from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache
from tiered_kv.plugin.decode import selection as decode_selection
from tiered_kv.plugin.decode.selection import DecodeSelection
from tiered_kv.plugin.queue.clock_tick import SharedClock, Tick
from tiered_kv.plugin.queue.order import RequestOrder
from tiered_kv.plugin.start.server_args import ServerArgs
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_policy import IterationPolicy
from tiered_kv.scheduler.request_policy import request_policies


class Quiet:
    """Takes any call and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __bool__(self) -> bool:
        return False


class NoLogprobs(Quiet):
    """In the place of what would write down the log-probabilities of prompts."""

    def calculate_num_input_logprobs(self, *args: Any, **kwargs: Any) -> int:
        return 0


#: Attributes of `Scheduler` for what does not take part.
_OFF = """
    enable_lora enable_hisparse enable_pdmux enable_unified_memory enable_fpm enable_dp_attention
    enable_priority_scheduling enable_priority_preemption enable_session_radix_cache
    enable_hicache_storage enable_dynamic_chunking is_hybrid_swa is_hybrid_ssm
    require_mlp_sync gracefully_exit schedule_low_priority_values_first _war_barrier_enabled
    abort_on_priority_when_disabled _engine_paused
"""
_NONE = """
    draft_worker rust_server external_corpus_manager prefill_delayer dllm_config chunked_req
    min_free_slots_delayer _pending_chunked_abort_req last_batch lora_drainer cur_batch_for_debug
    forward_sleep_time scripted_scheduler_hook truncation_align_size max_queued_requests
    hisparse_coordinator priority_scheduling_preemption_threshold
"""
PAGE_SIZE = 4
MAX_RUNNING = 16


def publish_arguments(directory: Path, **options: Any) -> Any:
    """SGLang reads its arguments from a place that the whole process shares.

    Making them puts our hooks into this process, as in a server's.
    """
    write_config(directory, vocab_size=VOCABULARY)
    args = ServerArgs(
        model_path=str(directory),
        device="cpu",
        attention_backend="torch_native",
        tiered_kv=True,
        tiered_kv_disk_dir="none",
        pp_max_micro_batch_size=MAX_RUNNING,
        **options,
    )
    on_release.publish(args)
    return args


class DecodeLoop(upstream.Scheduler):
    """`script` is called once per turn of the loop, before anything else, until it says False."""

    def __init__(
        self,
        args: Any,
        *,
        overlap: bool,
        n_pages: int = 64,
        n_host_pages: int = 128,
        page_size: int = PAGE_SIZE,
        chunk_tokens: int | None = None,
        max_running: int = MAX_RUNNING,
        is_mixed: bool = False,
        disk: PretendDisk | None = None,
    ) -> None:
        self.script: Callable[[], bool] = lambda: False
        self.finished: dict[str, Req] = {}
        n_tokens = n_pages * page_size
        pool = MHATokenToKVPool(
            n_tokens,
            page_size,
            torch.float32,
            1,
            2,
            self.n_layers,
            "cpu",
            enable_memory_saver=False,
        )
        self.token_to_kv_pool_allocator = on_release.paged_allocator()(
            n_tokens, page_size, torch.float32, "cpu", pool, need_sort=False
        )
        self.req_to_token_pool = self.make_rows(max_running)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            page_size=page_size,
        )
        self.tp_worker = self.model_worker = self.make_model(pool, overlap)
        parts = serving_parts(
            pool,
            self.token_to_kv_pool_allocator,
            page_size,
            n_host_pages,
            disk,
            lambda: self.tp_worker.version,
            self.paged_part(pool),
        )
        self.tree_cache = self.make_cache(params, parts, disk)
        gate = parts.hierarchy.load_back.gate
        pool.register_layer_transfer_counter(gate)
        self.tp_worker.register_hicache_layer_transfer_counter(gate)
        self._set_switches(args, overlap=overlap, page_size=page_size, max_running=max_running)
        self.max_total_num_tokens = n_tokens
        self.chunked_prefill_size = chunk_tokens
        self.is_mixed_chunk = is_mixed
        self.enable_hicache_storage = disk is not None
        self._set_components(args)
        self.init_overlap()
        self.now_s = 1.0
        self.clock = SharedClock(wanted=lambda: True, on_tick=lambda: None)

    # -- what a loop for models of another kind has in their places -----------------------------

    n_layers = 1

    def paged_part(self, pool: Any) -> DeviceBuffers | None:
        """What pages consist of; None: of all layers."""
        return None

    def make_rows(self, max_running: int) -> Any:
        return ReqToTokenPool(max_running, 1024, "cpu", False)

    def make_model(self, pool: Any, overlap: bool) -> KvModel:
        return KvModel(pool, self.req_to_token_pool, overlap=overlap)

    def make_cache(
        self, params: CacheInitParams, parts: CacheParts, disk: PretendDisk | None
    ) -> TieredPrefixCache:
        return TieredPrefixCache(params, parts)

    def _set_switches(self, args: Any, *, overlap: bool, page_size: int, max_running: int) -> None:
        self.server_args = args
        self.enable_overlap, self.enable_overlap_mlx = overlap, False
        self.page_size, self.max_running_requests = page_size, max_running
        self.device = "cpu"
        self.spec_algorithm = SpeculativeAlgorithm.NONE
        self.disaggregation_mode = upstream.DisaggregationMode.NULL
        self.schedule_policy = "fcfs"
        self.is_generation = self.enable_hierarchical_cache = True
        for name in _OFF.split():
            setattr(self, name, False)
        for name in _NONE.split():
            setattr(self, name, None)
        on_release.set_attributes(self)
        self.max_prefill_tokens = 4096
        self.max_prefill_bs = 0.0
        self.forward_ct = self.forward_ct_decode = 0
        self.total_prefill_uncached_tokens = self.total_prefill_busy_us = 0
        self.decode_moment_totals = [0.0] * 6
        self._prev_decode_launch_ts = None
        self.waiting_queue: list[Req] = []
        self.running_batch = upstream.ScheduleBatch(reqs=[], batch_is_full=False)
        self.result_queue: deque[Any] = deque()
        self.return_health_check_ipcs: deque[Any] = deque()

    def _set_components(self, args: Any) -> None:
        quiet = Quiet()
        self.model_config = SimpleNamespace(
            vocab_size=VOCABULARY,
            is_encoder_decoder=False,
            think_end_ids=None,
            self_opened_think_start_ids=None,
        )
        self.ps = SimpleNamespace(pp_size=1, tp_rank=0)
        self.policy = SchedulePolicy("fcfs", self.tree_cache, True, False, False)
        self.new_token_ratio_tracker = NewTokenRatioTracker(
            init=0.1, min=0.0, decay=0.01, current=0.1
        )
        self.forward_stream = self.schedule_stream = quiet
        self.request_receiver = SimpleNamespace(recv_requests=self._receive)
        self.flush_wrapper = self.session_controller = self.ipc_channels = quiet
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=quiet)
        self.profiler_manager = quiet
        self.load_inquirer = SimpleNamespace(
            _get_num_pending_tokens=lambda chunk_deduct: 0, get_loads=quiet
        )
        self.metrics_reporter = Quiet()
        self.metrics_reporter.metrics_collector = quiet
        self.metrics_reporter.num_generated_tokens = self.metrics_reporter.forward_ct_decode = 0
        self.metrics_collector = self.kv_events_publisher = quiet
        self.grammar_manager = SimpleNamespace(
            has_waiting_grammars=lambda: False,
            grammar_queue=[],
            abort_requests=lambda _: None,
            clear=lambda: None,
        )
        self.dllm_manager = SimpleNamespace(any_staging_reqs=lambda: False)
        self.load_snapshot_writer = None
        self.dp_attn_adapter = SchedulerDPAttnAdapter(
            **dict.fromkeys((f.name for f in dataclasses.fields(SchedulerDPAttnAdapter)), None)
            | {"get_require_mlp_sync": lambda: False}
        )
        self.ngram_embedding_manager = SimpleNamespace(
            prepare_for_forward=lambda batch, chunked_req: batch
        )
        self.batch_result_processor = SchedulerBatchResultProcessor(
            is_generation=True,
            disaggregation_mode=self.disaggregation_mode,
            enable_overlap=self.enable_overlap,
            enable_overlap_mlx=False,
            model_config=self.model_config,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            tree_cache=self.tree_cache,
            hisparse_coordinator=None,
            req_to_token_pool=self.req_to_token_pool,
            decode_offload_manager=None,
            metrics_collector=quiet,
            metrics_reporter=self.metrics_reporter,
            draft_worker=None,
            model_worker=self.tp_worker,
            logprob_result_processor=NoLogprobs(),
            output_streamer=SimpleNamespace(stream_output=self._stream),
            abort_request=self.abort_request,
            **on_release.of_result_processor(args),
        )

    @property
    def result_queue(self) -> deque[Any]:
        """Results to come; a loop that is turned again goes on with what the last one left."""
        return self._results

    @result_queue.setter
    def result_queue(self, results: deque[Any]) -> None:
        if not getattr(self, "_results", None):
            self._results = results

    # -- what a test does ---------------------------------------------------------------------

    def choose_by(self, policy: IterationPolicy) -> DecodeSelection:
        """Puts an iteration policy in charge of who decodes."""
        costs = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
        selection = DecodeSelection(self, policy, costs, self.clock)
        self.tree_cache.decode_selection = selection
        self.tree_cache.resumes_requests = True
        self.policy.tiered_kv_selection = selection
        return selection

    def govern(self, request_policy: str, iteration_policy: str, costs: CostModel) -> None:
        """Puts both policies in charge, as the hooks on a server do."""
        parts = self.tree_cache.parts
        parts.cost_model = costs
        order = RequestOrder(
            self,
            request_policies.get(request_policy)(),
            parts.hierarchy,
            costs,
            parts.residency,
            parts.metrics,
        )
        self.tiered_kv_order = self.policy.tiered_kv_order = order
        self.tree_cache.observer = order
        self.clock = order.clock
        self.tree_cache.resumes_requests = True
        self.tree_cache.decode_selection = self.policy.tiered_kv_selection = None
        decode_selection.install(self, iteration_policy)

    def arrive(self, req: Req) -> None:
        self._add_request_to_queue(req)

    def run(self, script: Callable[[], bool]) -> None:
        """Turns SGLang's loop until `script`, asked before each turn, says False."""
        self.script = script
        self.gracefully_exit = False
        if self.enable_overlap:
            self.event_loop_overlap()
        else:
            self.event_loop_normal()

    def serve(self, *reqs: Req, patience: int = 2000) -> dict[str, list[int]]:
        """All of them from their arrival to their last token; what each said."""
        for req in reqs:
            self.arrive(req)
        turns = iter(range(patience))

        def goes_on() -> bool:
            assert next(turns, None) is not None, "it never ends"
            return not all(req.finished() for req in reqs) or not self.is_at_rest

        self.run(goes_on)
        return {req.rid: list(req.output_ids) for req in reqs}

    @property
    def is_at_rest(self) -> bool:
        # A prompt between two of its chunks is in no batch where there was no room for the next.
        nobody_runs = self.last_batch is None and self.chunked_req is None
        return nobody_runs and self.running_batch.is_empty() and not self.waiting_queue

    def check_nothing_is_held(self) -> None:
        """With no request left: every slot is free or cache, and no pin is left."""
        assert self.is_at_rest
        hierarchy = self.tree_cache.hierarchy
        assert hierarchy.drain()
        while hierarchy.progress.is_busy:
            hierarchy.poll()
            hierarchy.rest()
        available = self.token_to_kv_pool_allocator.available_size()
        assert available + self.tree_cache.evictable_size() == self.max_total_num_tokens
        assert self.tree_cache.protected_size() == 0
        pool = self.req_to_token_pool
        assert sorted(pool.free_slots) == list(range(1, pool.size + 1))
        forest = hierarchy.context.forest
        forest.check_integrity()
        host = hierarchy.context.host
        held = sum(node.n_pages for node in forest.nodes() if node.slots(Tier.HOST) is not None)
        assert held + host.n_free == host.n_pages

    def close(self) -> None:
        """Ends the tiers' threads."""
        self.tree_cache.hierarchy.close(1.0)

    # -- in the place of other processes ------------------------------------------------------

    def _receive(self, local_reqs: list[Any] | None = None) -> list[Any]:
        self.now_s += 0.01
        self.clock.take(Tick(self.now_s))
        self.gracefully_exit = not self.script()
        return []

    def _stream(self, reqs: list[Req], return_logprob: bool, skip: Req | None = None) -> None:
        for req in reqs:
            if req.finished():
                self.finished[req.rid] = req

    def on_idle(self) -> None:
        self.new_token_ratio_tracker.reset()
