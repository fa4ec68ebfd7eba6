"""How long prefills take, for the cost model to learn from; hooked into the scheduler's step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tiered_kv.scheduler.calibration import StepObservation

if TYPE_CHECKING:
    from tiered_kv.tiers.hierarchy import KVHierarchy

#: Launched passes whose result is still to come; overlap has two at most.
LAUNCHED_MAX = 8


class StepTimes:
    """Observes passes that only prefill, and that waited for no load.

    synchronous: whether `run_batch` returns when the pass is over, as it does on a CPU. Elsewhere
    passes run one after the other on the device, and the result of one is handled when it is there:
    a pass took the time since its launch, or since the result before, whichever was later.
    """

    def __init__(self, hierarchy: KVHierarchy, *, synchronous: bool) -> None:
        self._hierarchy = hierarchy
        self._synchronous = synchronous
        self._launched: dict[float, tuple[tuple[int, int], ...]] = {}
        self._last_result_at = 0.0

    def launched(self, batch: Any) -> None:
        mode = batch.forward_mode
        if not mode.is_extend() or mode.is_mixed() or batch.hicache_consumer_index >= 0:
            return
        prefills = tuple(zip(batch.extend_lens, batch.prefix_lens, strict=True))
        if self._synchronous:
            self._observe(prefills, time.monotonic() - batch.launch_ts)
            return
        self._launched[batch.launch_ts] = prefills
        while len(self._launched) > LAUNCHED_MAX:
            del self._launched[next(iter(self._launched))]

    def finished(self, batch: Any) -> None:
        if self._synchronous:
            return
        now = time.monotonic()
        prefills = self._launched.pop(batch.launch_ts, None)
        if prefills is not None:
            self._observe(prefills, now - max(batch.launch_ts, self._last_result_at))
        self._last_result_at = now

    def _observe(self, prefills: tuple[tuple[int, int], ...], seconds: float) -> None:
        self._hierarchy.observe_step(StepObservation(prefills, 0, 0, seconds))


def after_run_batch(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.run_batch`."""
    if getattr(scheduler.server_args, "tiered_kv", False):
        scheduler.tree_cache.step_times.launched(batch)


def after_batch_result(result: None, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.process_batch_result`."""
    if getattr(scheduler.server_args, "tiered_kv", False):
        scheduler.tree_cache.step_times.finished(batch)
