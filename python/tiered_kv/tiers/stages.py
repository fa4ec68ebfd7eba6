"""What becomes of transfers between the stages of a pipeline, which are passes apart.

Stages make the same calls in the same order, as tensor-parallel ranks do, but a stage begins a
pass when the one before it has handed it on, and waits in it for what that one does in its next:
who waited here for another to come to the same pass would be waited for. So nobody does. In one
pass each stage gives what has ended with it, and how; some passes later, when all have come by
there, each gets the minimum, and acts on it: in the same pass, on the same figures. In between
nothing of that is acted on, and one round of this is under way at a time.

Copies between memories that somebody needs out of the way are waited for by each stage on its own
(`settle`), and taken for done: a stage where one fails cannot tell the others in time, and ends.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tiered_kv.core.errors import TieredKVError
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.progress import SETTLE_TIMEOUT_S, Finish, Progress
from tiered_kv.tiers.transfer import Completion, Meeting, TransferQueue

#: Jobs of one queue that a round looks at: the first.
JOBS_MAX = 32
#: Values of each job.
_JOB_VALUES = 4

COPY_FAILED = (
    "A copy between device and host failed on this stage of the pipeline, and the others have gone "
    "on from it: look at the kernel's log and restart the server."
)


class StagesPartedError(TieredKVError, RuntimeError):
    """Stages do not do the same any more; what they would compute together is wrong."""


@dataclass(frozen=True, slots=True)
class _Round:
    begun: int
    """The pass it was begun in."""
    jobs: tuple[tuple[TransferQueue[Any], int], ...]
    """Those that were in flight, by queue and number."""
    result: Callable[[], list[int]]


class StagesProgress(Progress):
    """Progress, a round at a time: see the module."""

    def __init__(
        self,
        context: TierContext,
        finish: Mapping[TransferQueue[Any], Finish],
        meeting: Meeting,
    ) -> None:
        super().__init__(context, finish)
        self._meeting = meeting
        self._round: _Round | None = None

    @property
    def is_busy(self) -> bool:
        return self._round is not None or super().is_busy

    def poll(
        self, wants: bool, votes: Callable[[], list[int]], counted: Callable[[list[int]], None]
    ) -> None:
        """Acts on the round under way if it is due, and begins another if there is a reason.

        `votes` and `counted` are called once a round.
        """
        if self._round is not None:
            if self._meeting.n_pass < self._round.begun + self._meeting.lag:
                return
            self._end(counted)
        if wants or super().is_busy:
            self._begin(votes())

    def _begin(self, votes: list[int]) -> None:
        ended = [
            (queue, number, completion)
            for queue in self._finish
            for number, completion in queue.ended_here()[:JOBS_MAX]
        ]
        jobs = tuple((queue, number) for queue, number, _ in ended)
        values = [value for _, _, completion in ended for value in _values(completion)]
        now_us = int((self._clock() - self._started_at) * 1e6)
        state = self._state(jobs, len(votes))
        result = self._meeting.give([state, -state, now_us, *values, *votes])
        self._round = _Round(self._meeting.n_pass, jobs, result)

    def _state(self, jobs: Sequence[tuple[TransferQueue[Any], int]], n_votes: int) -> int:
        """A number that differs between stages of which one has done something else."""
        context = self._context
        names = "".join(f"{queue.name} {number} " for queue, number in jobs)
        free = context.host.n_free, context.allocator.available(), len(context.forest)
        text = f"{self._meeting.n_pass} {n_votes} {free} {names}"
        (number,) = struct.unpack("<q", hashlib.sha256(text.encode()).digest()[:8])
        return int(number) >> 1  # both signs of it fit into 64 bits

    def _end(self, counted: Callable[[list[int]], None]) -> None:
        this, self._round = self._round, None
        assert this is not None
        least, negative_most, now_us, *agreed = this.result()
        if least != -negative_most:
            raise StagesPartedError(
                "The stages of the pipeline have parted: they do not keep the same prompts any "
                "more; restart the server, and report what it was doing."
            )
        self._context.now_s = now_us / 1e6
        for i, (queue, number) in enumerate(this.jobs):
            is_over, n_done, negative_us, negative_most = agreed[
                _JOB_VALUES * i : _JOB_VALUES * (i + 1)
            ]
            completion = queue.take_one(number) if is_over else None
            if completion is None:
                continue
            self._finish[queue](
                replace(
                    completion,
                    n_done=n_done,
                    service_s=-negative_us / 1e6,
                    is_as_asked=n_done == -negative_most,
                )
            )
        counted(agreed[_JOB_VALUES * len(this.jobs) :])

    def settle(self, queue: TransferQueue[Any], timeout_s: float | None = None) -> bool:
        """Waits for what is in flight in `queue` on this stage, and takes it for done on all.

        Raises StagesPartedError if it failed here, or takes too long.
        """
        if self._context.stages is None:
            return super().settle(queue, timeout_s)
        if not queue.in_flight:
            return True
        with self._context.pacer.hurry():
            is_over = queue.wait(SETTLE_TIMEOUT_S if timeout_s is None else timeout_s)
        if not is_over:
            raise StagesPartedError(COPY_FAILED)
        for completion in queue.take(queue.everything()):
            if completion.n_done < completion.job.n_pages:
                raise StagesPartedError(COPY_FAILED)
            # What is learned from times decides: nothing is learned from what was not agreed on.
            self._finish[queue](replace(completion, is_as_asked=False))
        return True

    def learn(self) -> None:
        """Nothing is learned from passes: each stage has others."""


def _values(completion: Completion[Any] | None) -> list[int]:
    """What the minimum is taken of for one job."""
    if completion is None:
        return [0] * _JOB_VALUES
    n_done = completion.n_done
    most = -n_done if completion.is_as_asked else -completion.job.n_pages - 1
    return [1, n_done, -int(completion.service_s * 1e6), most]
