"""A scheduler in miniature: SGLang's queue, requests and steps, over real tiers."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from support_tiers.tier_rig import PAGE_SIZE, Rig, tokens_of
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.forest.node import Tokens
from tiered_kv.memory.read_order import Urgency
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
from tiered_kv.plugin.cache.residency_log import ResidencyLog
from tiered_kv.plugin.hooks import scheduler as scheduler_hooks
from tiered_kv.plugin.queue.clock_tick import Tick
from tiered_kv.plugin.queue.order import RequestOrder
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState

CHUNK = 8 * PAGE_SIZE


def _not_asked(*_: Any) -> None:
    raise AssertionError("SGLang's own order was asked for")


class Spy:
    """Plans what the test says, by default the order of arrival; remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, float]] = []
        self.changes: list[int] = []
        self.states: list[SchedulerState] = []
        self.limits: list[int] = []
        self.turns: list[tuple[bool, int, float]] = []
        self.plan_fields: dict[str, Any] = {}
        self.order: list[int] | None = None

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("arrival", request.request_id, now_s))

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("admission", request.request_id, now_s))

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("finish", request.request_id, now_s))

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("abort", request.request_id, now_s))

    def on_cached_change(self, request: QueuedRequest, now_s: float) -> None:
        self.changes.append(request.request_id)

    def urgency(self, request: QueuedRequest) -> Urgency:
        return 0.0, request.queued_s

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        self.states.append(state)
        self.limits.append(limit)
        turns = state.turns
        self.turns.append((turns.decoded_last, turns.in_a_row, turns.decoded_s))
        order = self.order
        if order is None:
            order = [request.request_id for request in state.candidates()]
        return AdmissionPlan(tuple(order[:limit]), **self.plan_fields)


class MiniScheduler:
    """The attributes and the steps of SGLang's scheduler that matter here."""

    def __init__(
        self, rig: Rig, policy: Any, *, lora_drainer: Any = None, prefill_delayer: Any = None
    ) -> None:
        self.waiting_queue: list[Req] = []
        self.chunked_req: Req | None = None
        self._pending_chunked_abort_req: Req | None = None
        self.max_queued_requests: int | None = None
        self.disaggregation_mode = None
        self.has_queue_room = True
        self.sent: list[Any] = []
        tokenizer = SimpleNamespace(send_output=lambda answer, req: self.sent.append(answer))
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=tokenizer)
        self.chunked_prefill_size: int | None = CHUNK
        self.max_prefill_tokens = 16384
        self.page_size = PAGE_SIZE
        self.is_mixed_chunk = False
        self.spec_algorithm = SpeculativeAlgorithm.NONE
        self.require_mlp_sync = False
        self.truncation_align_size: int | None = None
        self.lora_drainer = lora_drainer
        self.prefill_delayer = prefill_delayer
        self.lacks_adapter: set[str] = set()
        self.tree_cache = SimpleNamespace(
            evictable_size=lambda: 0, saved_tokens=0, supports_mamba=lambda: False
        )
        self.has_decode_memory = True
        self.running_batch = SimpleNamespace(
            reqs=[],
            batch_is_full=False,
            check_decode_mem=lambda: self.has_decode_memory,
            new_tokens_required_next_decode=lambda: 0,
        )
        self.offered: list[str] | None = None
        self.chunk_seen: int | None = None
        self.chunks_seen: list[Req | None] = []
        self.mix_seen: bool | None = None
        self.mixed: bool | None = None
        self.admit = 1
        residency = ResidencyLog(rig.events)
        rig.context.listener = residency
        costs = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
        self.tiered_kv_order = RequestOrder(
            self, policy, rig.hierarchy, costs, residency, MetricsRecorder()
        )
        self._rig = rig
        self.policy = SimpleNamespace(tiered_kv_order=self.tiered_kv_order)

    def tick(self, now_s: float) -> None:
        self.tiered_kv_order.clock.take(Tick(now_s))

    def arrive(self, req: Req) -> None:
        scheduler_hooks.add_to_queue(MiniScheduler._append, self, req)

    _add_request_to_queue = arrive

    def _append(self, req: Req) -> None:
        if self.has_queue_room:
            self.waiting_queue.append(req)

    def step(self) -> list[str]:
        """A pass of `_get_new_batch_prefill_raw`; returns who was admitted."""
        batch, _ = scheduler_hooks.form_prefill(
            MiniScheduler._raw, self, running_batch=self.running_batch
        )
        return [] if batch is None else [req.rid for req in batch.reqs]

    def _raw(self, running_batch: Any) -> tuple[Any, Any]:
        self.offered = None
        self._rig.hierarchy.poll()
        self.tiered_kv_order.polled()
        if running_batch.batch_is_full or not self.waiting_queue:
            return None, running_batch
        scheduler_hooks.put_in_order(
            _not_asked,
            self.policy,
            self.waiting_queue,
            running_batch,
        )
        self.offered = [req.rid for req in self.waiting_queue]
        self.chunks_seen.append(self.chunked_req)
        self.chunk_seen, self.mix_seen = self.chunked_prefill_size, self.is_mixed_chunk
        if self.lora_drainer is not None:
            self.lora_drainer.update_draining_state(self.waiting_queue, running_batch.reqs)
        if self.prefill_delayer is not None:
            n = len(self.waiting_queue)
            self.prefill_delayer._negotiate_should_allow_prefill(waiting_queue_len=n)
        able = [req for req in self.waiting_queue if self._can_schedule_lora_req(req)]
        admitted = able[: self.admit]
        if not admitted:
            return None, running_batch
        self.waiting_queue = [req for req in self.waiting_queue if req not in admitted]
        scheduler_hooks.before_mixing(
            None, SimpleNamespace(tree_cache=SimpleNamespace(observer=self.tiered_kv_order))
        )
        self.mixed = self.is_mixed_chunk
        decoding = list(running_batch.reqs)
        running_batch.reqs += admitted
        for req in admitted:
            self.match(req)
        batch = SimpleNamespace(
            reqs=admitted,
            extend_num_tokens=sum(len(req.origin_input_ids) for req in admitted),
            prefill_stats=None,
            decoding_reqs=decoding if self.mixed and decoding else None,
        )
        return batch, running_batch

    def _can_schedule_lora_req(self, req: Req) -> bool:
        return scheduler_hooks.may_start(
            lambda scheduler, req: req.rid not in scheduler.lacks_adapter, self, req
        )

    def match(self, req: Req) -> None:
        """As `Req.init_next_round_input` and `ScheduleBatch.prepare_for_extend` do."""
        hierarchy = self._rig.hierarchy
        prefix = hierarchy.match(hierarchy.root(req.extra_key), req.origin_input_ids)
        req.last_node = prefix.last_device
        req.cached_tokens_device = sum(node.n_tokens for node in prefix.device)

    @property
    def waiting(self) -> list[str]:
        return [req.rid for req in self.waiting_queue]


def request(rid: str, tokens: Tokens | None = None, **fields: Any) -> Req:
    tokens = tokens_of(abs(hash(rid)) % 1000 + 1, 2) if tokens is None else tokens
    return Req(rid, "", tokens, SamplingParams(max_new_tokens=8), **fields)


def three(scheduler: MiniScheduler) -> list[Req]:
    reqs = [request(rid) for rid in "abc"]
    for req in reqs:
        scheduler.arrive(req)
    return reqs


def running(scheduler: MiniScheduler, rid: str) -> Req:
    """A request that was admitted and has two tokens."""
    req = request(rid)
    scheduler.arrive(req)
    order = scheduler.tiered_kv_order
    scheduler.waiting_queue.remove(req)
    scheduler.match(req)
    order.queue.admitted([req])
    req.output_ids = array("q", [5, 6])
    return req
