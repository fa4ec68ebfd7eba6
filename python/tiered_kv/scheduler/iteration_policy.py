"""The iteration-level policy's interface: which running requests decode now. And policies by name.

Decoding reads the weights once per iteration and every chosen request's KV; attention over private
KV does not batch, so long contexts make iterations long. A policy may leave requests out of an
iteration (they are parked: their KV stays, they get no token) so that others get theirs in time.

A policy keeps no state: what it needs of the past is in the requests (when each got its last
token), so ranks that are given equal values decide equally, and asking twice does no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from tiered_kv.core.registry import Registry
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.plan import PrefillRoom
from tiered_kv.scheduler.prompts_ahead import PromptsAhead
from tiered_kv.scheduler.request_policy import SchedulerState


@dataclass(slots=True, eq=False)
class RunningRequest:
    """One request that decodes, or could. Belongs to the caller, who may update and reuse it."""

    request_id: int
    context_tokens: int
    """Tokens that its next token attends to."""
    last_token_s: float
    """When it got its last token, on the clock of `IterationState.now_s`."""
    tbt_s: float | None = None
    """Longest time between two tokens that it was promised; None: nothing was."""
    next_token_due_s: float | None = None
    """When its next token is due if its mean pace is to hold: `first token + tokens so far x
    tbt_s`, which is past for one that is behind. None: not known."""
    gang: int | None = None
    """Those with the same number begin alike; with cascade attention that is read once. None:
    with nobody."""
    shared_tokens: int = 0
    """Leading tokens of its context that it shares with its gang."""
    can_park: bool = True
    """False: it decodes in every iteration, and is not swapped out."""
    can_swap: bool = True
    """False: its KV stays on the device, as when it made way for others before."""
    max_park_s: float | None = None
    """Longest time without a token before it decodes whatever else is due; None: the policy's, or
    `tbt_s` if that is longer."""
    weight: float = 1.0
    """What it counts for where not everyone can be in time."""
    own_tokens: int | None = None
    """KV tokens on the device that nobody else uses: what swapping it out frees. None: all but
    `shared_tokens`."""
    host_tokens: int = 0
    """Of these, tokens that the host has already: swapping moves only the others."""

    @property
    def freed_tokens(self) -> int:
        """KV tokens that swapping it out frees."""
        own = self.own_tokens
        return self.context_tokens - self.shared_tokens if own is None else own


@dataclass(slots=True)
class IterationState:
    """What a policy may look at. It belongs to the caller: read only."""

    now_s: float
    running: Sequence[RunningRequest]
    """All that decode, parked or not, without those that are swapped out."""
    costs: CostModel
    """Predictions, in seconds."""
    is_cascade: bool = False
    """Whether a gang's shared tokens are read once per iteration."""
    prefill: SchedulerState | None = None
    """What the request-level policy is asked with, if anything waits to be prefilled; its
    `turns` say what ran last. None: `IterationPlan.room` is not wanted."""
    ahead: PromptsAhead | None = None
    """What could be prefilled next, in the order in which it will be; None: not known."""
    is_mixed: bool = False
    """Whether those who are chosen decode in the same iteration as the prefill."""
    prefill_load: float = 0.0
    """Share of the time that is prefill's alone: what it took of late, or, if prompts wait, at
    least the third that its turns take (`PrefillTurns`)."""
    is_hurried: bool = False
    """Without `prefill`: what the last plan with it said (`IterationPlan.is_hurried`)."""
    short_tokens: int = 0
    """KV tokens that the device lacks: `IterationPlan.swap_out` says who makes room. 0: none."""
    short_for_tbt_s: float | None = None
    """The room is for a waiting request with this token objective (infinity: without): only
    requests with looser ones make way. None: it is for those who run, so anybody may have to."""


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """What the next iteration does."""

    decode: tuple[int, ...] | None = None
    """Ids of those who decode, never empty if anyone runs; None: everyone."""

    room: PrefillRoom | None = None
    """What those who decode leave to a prefill; None: what they would if everyone did, which the
    request policy says (`AdmissionPlan.within`)."""

    swap_out: tuple[int, ...] = ()
    """Whose KV goes to the host, in this order; none of them is in `decode`."""

    is_hurried: bool = False
    """Whether who waits needs the throughput: then it counts more than token objectives."""


EVERYONE = IterationPlan()
"""What SGLang does."""


@dataclass(slots=True)
class RunningTotals:
    """What is kept of the running requests as they come, go and decode: O(1) for each change."""

    n: int = 0
    context_tokens: int = 0
    """Sum of their contexts."""
    shared_tokens_saved: int = 0
    """Tokens of these that need not be read because gangs read theirs once."""
    decoded_s: float = 0.0
    """When the last iteration in which they all decoded ended."""
    n_parked: int = 0
    """Requests that did not decode in the last iteration."""
    _objectives: dict[float, int] = field(default_factory=dict)
    """How many have each token objective."""

    @property
    def tightest_tbt_s(self) -> float:
        """The least token objective; infinity if there is none. O(distinct objectives)."""
        return min(self._objectives, default=math.inf)

    def add(self, tbt_s: float | None, context_tokens: int) -> None:
        """A request with this objective and context joins."""
        self.n += 1
        self.context_tokens += context_tokens
        if tbt_s is not None:
            self._objectives[tbt_s] = self._objectives.get(tbt_s, 0) + 1

    def remove(self, tbt_s: float | None, context_tokens: int) -> None:
        """A request that was added with this objective, and has this context now, leaves.

        Raises KeyError for an objective that nobody has.
        """
        self.n -= 1
        self.context_tokens -= context_tokens
        if tbt_s is not None:
            left = self._objectives[tbt_s] - 1
            if left:
                self._objectives[tbt_s] = left
            else:
                del self._objectives[tbt_s]

    def decoded(self, now_s: float) -> None:
        """Everybody got a token at `now_s`."""
        self.context_tokens += self.n
        self.decoded_s = now_s
        self.n_parked = 0


class IterationPolicy(Protocol):
    """Chooses who decodes. Has no state."""

    def fits(self, totals: RunningTotals, costs: CostModel, now_s: float) -> bool:
        """Whether everyone decodes in an iteration that starts at `now_s`, seen from totals alone.

        Then `plan` need not be asked, unless prefill or memory is the question. False says only
        that it must be looked at.
        """
        ...

    def plan(self, state: IterationState) -> IterationPlan:
        """The next iteration. Must not change `state`."""
        ...


class AllDecode:
    """Everyone in every iteration: what SGLang does."""

    def fits(self, totals: RunningTotals, costs: CostModel, now_s: float) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def plan(self, state: IterationState) -> IterationPlan:  # noqa: ARG002
        """Everyone, in chunks as configured; nobody is swapped out."""
        return EVERYONE


def decode_tokens(
    requests: Iterable[RunningRequest], *, is_cascade: bool = False
) -> tuple[int, int, int]:
    """(context tokens, requests, shared tokens saved) for `CostModel.iteration_s`."""
    context = n = saved = 0
    gangs: dict[int, int] = {}
    for request in requests:
        context += request.context_tokens
        n += 1
        if is_cascade and request.gang is not None:
            saved += request.shared_tokens
            gangs[request.gang] = max(gangs.get(request.gang, 0), request.shared_tokens)
    return context, n, saved - sum(gangs.values())


IterationPolicyFactory: TypeAlias = Callable[[], IterationPolicy]

iteration_policies: Registry[IterationPolicyFactory] = Registry("iteration policy")
for _name, _target in {
    "all": "iteration_policy:AllDecode",
    "slack": "iteration_slack:SlackIterations",
    "round-robin": "iteration_round_robin:RoundRobin",
}.items():
    iteration_policies.register(_name, f"tiered_kv.scheduler.{_target}")
