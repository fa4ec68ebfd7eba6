"""What room those who decode leave for a prefill: asked by whoever forms prefills."""

from __future__ import annotations

from typing import Protocol, TypeVar

from tiered_kv.scheduler.iteration_policy import IterationPlan
from tiered_kv.scheduler.prompts_ahead import PromptsAhead
from tiered_kv.scheduler.request_policy import SchedulerState

Batch_contra = TypeVar("Batch_contra", contravariant=True)


class DecodeRoom(Protocol[Batch_contra]):
    """Whoever chooses who decodes; the batch is that of those who run, as the engine has it."""

    def begin_pass(self, batch: Batch_contra) -> None:
        """A scheduling pass begins, in which those in `batch` run; perhaps nobody."""
        ...

    def plan_prefill(
        self, batch: Batch_contra, prefill: SchedulerState, ahead: PromptsAhead | None
    ) -> IterationPlan:
        """What room the decodes of `batch` leave for a prefill that runs before them.

        prefill: what the order of the queue was asked with. ahead: see `IterationState.ahead`.
        """
        ...
