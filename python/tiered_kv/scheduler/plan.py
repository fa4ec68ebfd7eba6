"""What a scheduling policy decides: a frozen value that the server or the simulator carries out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiered_kv.scheduler.prompts_ahead import PromptsAhead


@dataclass(frozen=True, slots=True)
class PrefillRoom:
    """What those who decode leave to a prefill; made by `prefill_room.py` alone."""

    tokens: int | None = None
    """Most tokens of the pass, decodes of a mixed one counted as one each; None: no limit. 0: they
    decode first."""
    admit_at_most: int | None = None
    """Most waiting requests that are admitted within `tokens`; None: no such limit."""


NO_LIMIT = PrefillRoom()
#: Requests asked of a policy at first; more if they could all be admitted at once.
PLAN_LIMIT = 16


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
    """Most tokens to compute in this iteration, whoever decodes: more would make somebody late who
    waits. None: the configured chunk size. 0: no prefill."""

    room: PrefillRoom = NO_LIMIT
    """What those who run leave if all of them decode. Where an iteration policy has an answer
    (`IterationPlan.room`), that one counts and not this."""

    ahead: PromptsAhead | None = field(default=None, compare=False, repr=False)
    """What a prefill that runs alone could compute, in the order of admission; None: not asked."""

    mix_decodes: bool | None = None
    """Whether running requests decode in the same iteration, if they can; None: as configured."""

    admit_at_most: int | None = None
    """Most requests of `order` to admit before asking again; None: no such limit. More would break
    the memory forecast, or the deadline of one of the first."""

    first_or_none: bool = False
    """Whether nobody may pass the first: if it cannot start now, for want of whatever it is (room,
    the weights of its adapter), nobody is admitted, so that those who run make way for it."""

    unfinished_at_most: int | None = None
    """Most tokens of the prompt that was begun, so that others can be computed in its pass; None:
    as many as fit. A baseline's; only the simulator carries it out."""

    waits_for_gangs: bool = False
    """Whether some wait for the rest of their gang (`forming.py`), or for what one of it computes
    in a pass that is under way: it is meant, and will not last, if `order` is empty then and nobody
    runs."""

    put_back_unfinished: bool = False
    """Whether the prompt that was begun goes back to the queue instead of on. What is computed of
    it stays in the cache, so whole pages are not lost. Only if `SchedulerState.can_put_back`."""

    def within(self, room: PrefillRoom | None = None) -> AdmissionPlan:
        """The plan to carry out: with the lesser of its own limits and those of a room.

        room: the iteration policy's; None: it has none, so that of the plan holds. The one of two
        is not weighed against the other: this is the only place in which they meet.
        """
        room = self.room if room is None else room
        return replace(
            self,
            prefill_tokens=_lesser(self.prefill_tokens, room.tokens),
            admit_at_most=_lesser(self.admit_at_most, room.admit_at_most),
        )


def _lesser(first: int | None, second: int | None) -> int | None:
    """None is no limit."""
    if first is None or second is None:
        return second if first is None else first
    return min(first, second)
