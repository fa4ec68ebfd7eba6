"""A waiting queue in SGLang 0.5.23's own order: its `SchedulePolicy` over its own prefix cache."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch

from benchmark.micro.scheduler_load import PAGE_SIZE, SPAN_S, Traffic, timed
from benchmark.micro.unified_tree import UnifiedTree

#: With these before their names in the table.
PREFIX = "sglang:"
#: What of the server's configuration the policy asks for; these are its defaults.
_CONFIGURATION = {
    "get_disagg": SimpleNamespace(disaggregation_mode="null"),
    "get_memory": SimpleNamespace(radix_eviction_policy="lru"),
}


class UpstreamServer:
    """A queue that stays equally long; a decision is one `calc_priority`.

    Raises ImportError beside a release without `UnifiedRadixCache`.
    """

    def __init__(self, policy: str, n_waiting: int) -> None:
        from sglang.srt.managers import schedule_policy

        for name, answer in _CONFIGURATION.items():
            setattr(schedule_policy, name, lambda answer=answer: answer)
        self.traffic = traffic = Traffic()
        tree = UnifiedTree("rust", PAGE_SIZE)
        first_slots = itertools.count(0, len(traffic.documents[0]))
        for document, first in zip(traffic.cached_documents, first_slots, strict=False):
            tree.insert(document, torch.arange(first, first + len(document)))
        name = policy.removeprefix(PREFIX)
        self.policy = schedule_policy.SchedulePolicy(name, tree.cache, False, False, False)
        self.queue: list[Any] = []
        for index in range(n_waiting):
            traffic.now_s = SPAN_S * index / n_waiting
            self._arrive()
        self.step_s = SPAN_S / n_waiting

    def _arrive(self) -> None:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        request = self.traffic.request()
        sampling = SamplingParams(max_new_tokens=request.max_new_tokens)
        req = Req(f"{request.request_id:09}", "", request.tokens, sampling)
        req.arrival_processed_tokens = self.traffic.processed_tokens
        req.time_stats.wait_queue_entry_time = self.traffic.now_s
        self.queue.append(req)

    def _plan(self) -> None:
        self.policy.calc_priority(self.queue, None, self.traffic.processed_tokens)

    def burst(self) -> float:
        """Microseconds of the first plan after all arrived."""
        return timed(self._plan)

    def decision(self) -> float:
        """One step; returns microseconds of what the policy did."""
        self.traffic.now_s += self.step_s
        self._arrive()
        microseconds = timed(self._plan)
        self.queue.pop(0)
        return microseconds
