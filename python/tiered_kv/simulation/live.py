"""A request while it is simulated, and the record that remains of it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Protocol

from tiered_kv.api.slo import Slo
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.scheduler.program_names import program_of
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.workload.request import Request, whole_blocks


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request; times in seconds since the start, lengths in tokens."""

    request_id: int
    session: int | None
    slo_class: str
    ttft_slo_s: float | None
    tbt_slo_s: float | None
    task_slo_s: float | None
    arrival_s: float
    input_tokens: int
    output_tokens: int
    admitted_s: float | None = None
    """First admission."""
    first_token_s: float | None = None
    finish_s: float | None = None
    """None: it was refused or aborted."""
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    """Host hits that had not come from a store below for this request."""
    disk_hit_tokens: int = 0
    shared_hit_tokens: int = 0
    """From the store of the fleet."""
    mean_tbt_s: float | None = None
    """Mean time between tokens; None with a single one."""
    p99_tbt_s: float | None = None
    max_tbt_s: float | None = None
    n_gaps: int = 0
    """Times between two of its tokens,"""
    n_late_gaps: int = 0
    """and those of them that were longer than its objective."""
    n_retractions: int = 0
    n_swaps: int = 0
    """Times that it made way with its KV kept."""

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request in an instance."""

    request: Request
    queued: QueuedRequest
    record: RequestRecord
    pinned: Node | None = None
    """The last node of its prefix, pinned on the device while it runs."""
    committed_units: int = 0
    """Leading units that are in the forest on the device and pinned."""
    private_tokens: int = 0
    """Tokens of KV it holds besides."""
    prefetched_tokens: int = 0
    """Tokens that were brought from disk, or a shared store, for it until it was admitted,"""
    shared_tokens: int = 0
    """and those of them that came from a shared store."""
    last_token_s: float = 0.0
    """When it got its last token."""
    n_swaps: int = 0
    n_made_way: int = 0
    """Those of them that were for others, who waited."""
    first_step: int = 0
    """Number of the first decode step it takes part in, since it last joined the batch."""
    token_times_s: list[array[float]] = field(default_factory=list)
    """Times of its tokens up to its last retraction, and of the first one after a prefill."""


def new_record(request: Request) -> RequestRecord:
    """The record of a request of which nothing is known but what it is."""
    return RequestRecord(
        request_id=request.request_id,
        session=request.session,
        slo_class=request.slo_class,
        ttft_slo_s=request.ttft_slo_s,
        tbt_slo_s=request.tbt_slo_s,
        task_slo_s=request.task_slo_s,
        arrival_s=request.arrival_s,
        input_tokens=request.input_tokens,
        output_tokens=request.output_tokens,
    )


class _Pool(Protocol):
    """What of the cache a new request is measured against."""

    @property
    def root(self) -> Node: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def capacity_tokens(self) -> int: ...


def queued_request(
    request: Request, settings: InstanceSettings, pool: _Pool, now_s: float, processed_tokens: int
) -> QueuedRequest:
    """What policies see of `request` as it joins, after `processed_tokens` of others' prefill."""
    max_new_tokens = request.output_tokens
    if (limit := settings.max_new_tokens) is not None:
        # Upstream admits nobody whose limit exceeds the pool.
        room = pool.capacity_tokens - request.input_tokens - 2 * settings.page_tokens
        max_new_tokens = max(max_new_tokens, min(limit, room))
    return QueuedRequest(
        request_id=request.request_id,
        arrival_s=request.arrival_s,
        root=pool.root,
        tokens=whole_blocks(request, pool.block_tokens),
        prompt_tokens=request.input_tokens,
        max_new_tokens=max_new_tokens,
        slo=Slo(
            request.slo_class, request.ttft_slo_s, request.tbt_slo_s, task_s=request.task_slo_s
        ),
        priority=request.priority,
        program=program_of("", _session(request) if settings.sessions_named else None),
        queued_s=now_s,
        processed_at_arrival=processed_tokens,
    )


def _session(request: Request) -> str | None:
    return None if request.session is None else str(request.session)


class AnswerBlocks:
    """Ids of the blocks that prompt and answer fill.

    An answer that nobody asks for again fills the cache like any other: its blocks get ids of
    their own, negative ones, so that they match nothing.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._next = -1

    def blocks(self, live: LiveRequest) -> Tokens:
        """Ids of all whole blocks of `live`'s KV."""
        prompt = live.queued.tokens
        n_new = live.queued.prefilled_tokens // self._block_tokens - len(prompt)
        if n_new <= 0:
            return prompt
        # Blocks of the answer are among `tokens` of one that was swapped out.
        n_before = len(prompt) - live.request.input_tokens // self._block_tokens
        known = live.request.output_blocks[n_before : n_before + n_new]
        n_own = n_new - len(known)
        own = array("q", range(self._next, self._next - n_own, -1))
        self._next -= n_own
        return prompt + known + own
