"""What a scheduling policy decides: a frozen value that the server or the simulator carries out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdmissionPlan:
    """Whom to admit next, in which order.

    The one who carries it out admits from the front, as long as memory and the iteration's token
    budget last, and stops at the first request that does not fit.
    """

    order: tuple[int, ...]
    """Request ids, first to be admitted first: the head of the order, as long as was asked for.
    One who is held (`SchedulerState.held`) is to run without the pages that have not come."""

    prefill_tokens: int | None = None
    """Most tokens to compute in this iteration; None: the configured chunk size. 0: no prefill."""

    mix_decodes: bool = False
    """Whether running requests decode in the same iteration, even where that is not configured."""

    relegated: frozenset[int] = frozenset()
    """Ids in `order` that were put behind the others because their deadline is beyond hope."""

    admit_at_most: int | None = None
    """Most requests of `order` to admit before asking again; None: no such limit. More would break
    the memory forecast, or the deadline of one of the first."""

    first_or_none: bool = False
    """Whether nobody may pass the first: if it cannot start now, for want of whatever it is (room,
    the weights of its adapter), nobody is admitted, so that those who run make way for it."""

    put_back_unfinished: bool = False
    """Whether the prompt that was begun goes back to the queue instead of on. What is computed of
    it stays in the cache, so whole pages are not lost. Only if `SchedulerState.can_put_back`."""
