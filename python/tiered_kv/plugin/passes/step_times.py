"""How long passes take, for the cost model to learn from; hooked into the scheduler's step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.passes.launched import LaunchedPasses, chunks_of
from tiered_kv.scheduler.calibration import DECODES_PER_OBSERVATION, StepObservation

if TYPE_CHECKING:
    from tiered_kv.tiers.hierarchy import KVHierarchy


class StepTimes(LaunchedPasses[StepObservation]):
    """Observes passes that waited for no load: those that prefill, and some that only decode."""

    def __init__(self, hierarchy: KVHierarchy, *, synchronous: bool) -> None:
        super().__init__(synchronous=synchronous)
        self._hierarchy = hierarchy
        self._n_decodes = 0

    def describe(self, batch: Any) -> StepObservation | None:
        """What the pass does, with the time still to come; None if it teaches nothing."""
        mode = batch.forward_mode
        if mode.is_extend() and batch.hicache_consumer_index < 0:
            chunks, context_tokens, n_decodes = chunks_of(batch)
            return StepObservation(chunks, context_tokens, n_decodes, 0.0)
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

    def over(self, described: StepObservation, start_s: float, end_s: float) -> None:
        self._hierarchy.observe_step(replace(described, seconds=end_s - start_s))


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
