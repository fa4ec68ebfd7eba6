"""What becomes of transfers: the same on all ranks, in the same order.

A transfer counts when it is done on every rank, and the ranks agree on that by one minimum. What
else a poll has to agree on goes with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from tiered_kv.scheduler.calibration import StepObservation
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.transfer import Completion, J, TransferQueue

#: A copy between memories takes milliseconds; one that takes this long will never end.
SETTLE_TIMEOUT_S = 10.0
#: Observed forward passes that may wait to be learned from.
STEPS_MAX = 16

#: What is done with each finished transfer of a queue.
Finish = Callable[[Completion[Any]], None]


class Progress:
    """finish: the queues between the tiers, in the order in which a poll looks at them."""

    def __init__(self, context: TierContext, finish: Mapping[TransferQueue[Any], Finish]) -> None:
        self._context = context
        self._finish = finish
        self._clock = time.monotonic
        self._started_at = self._clock()
        self._steps: list[StepObservation] = []

    def queues(self) -> list[TransferQueue[Any]]:
        return list(self._finish)

    @property
    def is_busy(self) -> bool:
        """Whether something is in flight: the same on every rank."""
        return any(queue.in_flight for queue in self._finish)

    def observe_step(self, step: StepObservation) -> None:
        """A forward pass was observed, in the same order on every rank."""
        if self._context.calibrator is not None:
            self._steps.append(step)
            del self._steps[:-STEPS_MAX]

    def poll(
        self, wants: bool, votes: Callable[[], list[int]], counted: Callable[[list[int]], None]
    ) -> None:
        """Agrees on what is done, if something is in flight or the caller `wants` it.

        votes: gives what else is to be agreed on; counted: is given the minimum of each vote.
        """
        if wants or self.is_busy:
            counted(self.advance(votes()))

    def advance(self, votes: Sequence[int] = ()) -> list[int]:
        """Acknowledges what is done on all ranks; returns the minimum of each vote.

        The ranks give equally many votes.
        """
        ready = [queue.ready() for queue in self._finish]
        n_ready = sum(map(len, ready))
        agreed = self._agree([*chain.from_iterable(ready), *votes])
        done = iter(agreed)
        for queue, values in zip(self._finish, ready, strict=True):
            self._acknowledge(queue, list(islice(done, len(values))))
        return agreed[n_ready:]

    def learn(self) -> None:
        """Learns now from the passes observed since the ranks have agreed last."""
        self._agree([])

    def settle(self, queue: TransferQueue[Any], timeout_s: float | None = None) -> bool:
        """Waits for what is in flight in `queue`; False if it took too long on some rank."""
        if not queue.in_flight:
            return True
        with self._context.pacer.hurry():
            queue.wait(SETTLE_TIMEOUT_S if timeout_s is None else timeout_s)
        everything = queue.everything()
        ready = self._context.collective.minimum(queue.ready())
        self._acknowledge(queue, ready)
        return ready == everything

    def _agree(self, values: list[int]) -> list[int]:
        """The minimum of each value over the ranks.

        And of the time, and of how long the forward passes took that were observed since; as
        negative values, so that the slowest rank's count.
        """
        context = self._context
        steps, self._steps = self._steps, []
        now_us = int((self._clock() - self._started_at) * 1e6)
        step_us = [-int(step.seconds * 1e6) for step in steps]
        agreed = context.collective.minimum([*values, now_us, *step_us])
        context.now_s = agreed[len(values)] / 1e6
        if context.calibrator is not None:
            for step, negative_us in zip(steps, agreed[len(values) + 1 :], strict=True):
                context.calibrator.observe_step(
                    step.prefills,
                    step.decode_contexts_tokens,
                    step.n_decodes,
                    -negative_us / 1e6,
                    step.shared_tokens_saved,
                )
        return agreed[: len(values)]

    def _acknowledge(self, queue: TransferQueue[Any], ready: list[int]) -> None:
        """These transfers of a queue are done, on all ranks (`TransferQueue.ready`)."""
        for completion in self._agreed(queue.take(ready)):
            self._finish[queue](completion)

    def _agreed(self, completions: list[Completion[J]]) -> list[Completion[J]]:
        """A page counts as moved only if it moved on every rank, a job as long as on the slowest.

        Both in one minimum: what is learned from the times decides, so ranks must learn alike.
        """
        if not completions:
            return completions
        counts = [c.n_done for c in completions]
        times_us = [-int(c.service_s * 1e6) for c in completions]
        # All that was asked for came, on every rank, and it was as much on each.
        most = [-c.n_done if c.is_as_asked else -c.job.n_pages - 1 for c in completions]
        agreed = self._context.collective.minimum([*counts, *times_us, *most])
        n = len(completions)
        return [
            replace(
                c,
                n_done=agreed[i],
                service_s=-agreed[n + i] / 1e6,
                is_as_asked=agreed[i] == -agreed[2 * n + i],
            )
            for i, c in enumerate(completions)
        ]
