"""How long passes take, for the cost model to learn from; hooked into the scheduler's step."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tiered_kv.scheduler.calibration import StepObservation

if TYPE_CHECKING:
    from tiered_kv.tiers.hierarchy import KVHierarchy

#: Launched passes whose result is still to come; overlap has two at most.
LAUNCHED_MAX = 8
#: Of passes that only decode, one in so many is observed: they resemble one another.
DECODES_PER_OBSERVATION = 8


class StepTimes:
    """Observes passes that waited for no load: those that prefill, and some that only decode.

    synchronous: whether `run_batch` returns when the pass is over, as it does on a CPU. Elsewhere
    passes run one after the other on the device, and the result of one is handled when it is there:
    a pass took the time since its launch, or since the result before, whichever was later.
    """

    def __init__(self, hierarchy: KVHierarchy, *, synchronous: bool) -> None:
        self._hierarchy = hierarchy
        self._synchronous = synchronous
        self._launched: dict[float, StepObservation] = {}
        self._last_result_at = 0.0
        self._n_decodes = 0

    def launched(self, batch: Any) -> None:
        step = self._work_of(batch)
        if step is None:
            return
        if self._synchronous:
            self._observe(step, time.monotonic() - batch.launch_ts)
            return
        self._launched[batch.launch_ts] = step
        while len(self._launched) > LAUNCHED_MAX:
            del self._launched[next(iter(self._launched))]

    def finished(self, batch: Any) -> None:
        if self._synchronous:
            return
        now = time.monotonic()
        step = self._launched.pop(batch.launch_ts, None)
        if step is not None:
            self._observe(step, now - max(batch.launch_ts, self._last_result_at))
        self._last_result_at = now

    def _work_of(self, batch: Any) -> StepObservation | None:
        """What the pass does, with the time still to come; None if it teaches nothing."""
        mode = batch.forward_mode
        if mode.is_extend() and batch.hicache_consumer_index < 0:
            chunks = tuple(zip(batch.extend_lens, batch.prefix_lens, strict=True))
            # Decodes that are mixed in come last, as chunks of one token.
            n_decodes = len(batch.decoding_reqs) if mode.is_mixed() else 0
            n_prefills = len(chunks) - n_decodes
            context_tokens = sum(before + 1 for _, before in chunks[n_prefills:])
            return StepObservation(chunks[:n_prefills], context_tokens, n_decodes, 0.0)
        if mode.is_decode():
            self._n_decodes += 1
            if self._n_decodes % DECODES_PER_OBSERVATION == 0:
                context_tokens = sum(
                    len(r.origin_input_ids) + len(r.output_ids) for r in batch.reqs
                )
                # The planner of cascade attention says it when the batch is launched.
                saved = batch.tree_cache.saved_tokens
                return StepObservation((), context_tokens, len(batch.reqs), 0.0, saved)
        return None

    def _observe(self, step: StepObservation, seconds: float) -> None:
        self._hierarchy.observe_step(replace(step, seconds=seconds))


def after_run_batch(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.run_batch`."""
    if getattr(scheduler.server_args, "tiered_kv", False):
        scheduler.tree_cache.step_times.launched(batch)
        pass_log = scheduler.tree_cache.parts.pass_log
        if pass_log is not None:
            pass_log.launched(batch)


def after_batch_result(result: None, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.process_batch_result`."""
    if getattr(scheduler.server_args, "tiered_kv", False):
        scheduler.tree_cache.step_times.finished(batch)
        pass_log = scheduler.tree_cache.parts.pass_log
        if pass_log is not None:
            pass_log.finished(batch)
