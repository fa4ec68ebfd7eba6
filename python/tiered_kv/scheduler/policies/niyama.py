"""Niyama (arXiv 2503.22562): hybrid EDF and shortest-remaining-processing, relegation, chunks by
slack.

- Order: deadline + alpha * predicted seconds of work left. alpha = 0 is EDF; a larger one favours
  short work, as SRPF does. Requests without a TTFT objective count with `BATCH_TTFT_S`.
- Relegation: a request that would miss its deadline even if it ran now goes behind all that can
  still meet theirs. It is not dropped.
- Chunks: the largest prefill that keeps the running requests' next tokens in time. It needs
  iterations that mix prefill and decode.

Work left is the prefill's, by the cost model, plus, for requests without a token objective, the
decoding of a typical output: the mean of past lengths plus two standard deviations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import nsmallest

from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.plan import AdmissionPlan, PrefillRoom
from tiered_kv.scheduler.prefill_room import Decodes, begun_tokens, room_beside
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState

BATCH_TTFT_S = 600.0


@dataclass(frozen=True, slots=True)
class _Rules:
    """Niyama's passes are as long as the running requests allow, whoever may arrive."""

    pass_share: float = math.inf


class Niyama(QuietPolicy):
    """Keeps the first two moments of past output lengths."""

    def __init__(self, alpha: float = 1.0) -> None:
        self._alpha = alpha
        self._n_finished = 0
        self._sum = 0.0
        self._sum_squares = 0.0

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:  # noqa: ARG002
        """One more output length is known."""
        self._n_finished += 1
        self._sum += request.output_tokens
        self._sum_squares += request.output_tokens**2

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        costs, now_s = state.costs, state.now_s
        decode_s = self._output_estimate() * costs.iteration_s(
            (), state.decode_context_tokens, len(state.running) + 1
        )

        def key(request: QueuedRequest) -> tuple[bool, float]:
            left_s = costs.prefill_s(request.uncached_tokens, request.cached_tokens)
            deadline_s = request.deadline_s
            if math.isinf(deadline_s):
                deadline_s = request.arrival_s + BATCH_TTFT_S
            is_late = not request.output_tokens and now_s + left_s > deadline_s
            if request.slo.tbt_s is None:
                left_s += decode_s
            return is_late, deadline_s + self._alpha * left_s

        order = tuple(r.request_id for r in nsmallest(limit, state.candidates(), key=key))
        return AdmissionPlan(order, room=self._room(state), mix_decodes=state.can_mix)

    def urgency(self, request: QueuedRequest) -> Urgency:
        """By deadline."""
        deadline_s = request.deadline_s
        return 0.0, deadline_s if math.isfinite(deadline_s) else request.arrival_s + BATCH_TTFT_S

    def _output_estimate(self) -> float:
        if not self._n_finished:
            return 0.0
        mean = self._sum / self._n_finished
        variance = max(0.0, self._sum_squares / self._n_finished - mean * mean)
        return mean + 2.0 * math.sqrt(variance)

    @staticmethod
    def _room(state: SchedulerState) -> PrefillRoom:
        """The most prefill with which no running request's next token comes late; none of it, where
        they cannot decode beside it, before they have had their turn."""
        if state.running and not state.can_mix and not state.turns.decoded_last:
            return PrefillRoom(0)
        due_s = math.inf
        for request in state.running:
            tbt_s = request.slo.tbt_s
            if tbt_s is not None:
                # A request that is late already cannot be helped by stopping everyone else.
                due_s = min(due_s, max(request.next_token_deadline_s, state.now_s + tbt_s))
        batch = Packing.of_all(state.costs, len(state.running), state.decode_context_tokens)
        decodes = Decodes(batch, batch.seconds, due_s - state.now_s)
        return PrefillRoom(room_beside(state, decodes, _Rules()).tokens(begun_tokens(state)))
