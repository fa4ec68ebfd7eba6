"""The request-level policy's interface: who is admitted next. And the policies by name.

A policy is told of every change (arrivals, admissions, finishes, and what became or ceased to be
cached), so it can keep its order incrementally, and is asked for the head of the order when there
is room. Time is passed in: the same objects serve the simulator and the server.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from tiered_kv.core.registry import Registry
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.prefill_turns import PrefillTurns
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.waiting import WaitingQueue


@dataclass(frozen=True, slots=True)
class Arriving:
    """Pages on their way from disk to the host, for a request that waits for them."""

    ready_s: float
    """When they should be there."""
    tokens: int
    """How many tokens they are."""

    def is_in_time(self, now_s: float, needed_s: float, latest_start_s: float) -> bool:
        """Whether they are expected when they are needed at the latest.

        latest_start_s: when it must be computed without them. If they are late they may not come:
        then they are expected to take as long again as they are late, and before that.
        """
        if now_s <= self.ready_s:
            return self.ready_s <= needed_s
        return now_s + (now_s - self.ready_s) <= min(needed_s, latest_start_s)


@dataclass(slots=True)
class SchedulerState:
    """What a policy may look at when it plans. It belongs to the caller: read only."""

    now_s: float
    waiting: WaitingQueue
    """All who wait, in queue order."""
    held: Mapping[int, Arriving]
    """Waiting requests, by id, whose pages are on their way. They do not run before those are
    there, or their patience is over, unless a plan says so."""
    running: Collection[QueuedRequest]
    """Requests that decode."""
    decode_context_tokens: int
    """Sum of the running requests' contexts."""
    processed_prefill_tokens: int
    """Prefill tokens computed since the start."""
    chunk_tokens: int
    """Most prefill tokens of one iteration, as configured."""
    costs: CostModel
    """Predictions, in seconds."""
    available_tokens: int | None = None
    """KV tokens on the device that are free or could be freed by eviction; None: not known."""
    host_tokens: int = 0
    """KV tokens that the host holds at most, for those that the device has no room for."""
    unfinished: QueuedRequest | None = None
    """The request whose prompt is computed in part and goes on in this iteration; it neither waits
    nor runs."""
    can_put_back: bool = False
    """Whether `AdmissionPlan.put_back_unfinished` can be carried out."""
    loading_bytes: int = 0
    """Bytes that are queued on the way from the host to the device."""
    shared_tokens_saved: int = 0
    """Of `decode_context_tokens`, those that a decode need not read because gangs read theirs once,
    with cascade attention."""
    turns: PrefillTurns = field(default_factory=PrefillTurns)
    """What ran last, as the executor keeps it: one object, told of every pass, or a prefill that
    waits for decodes waits for ever."""
    can_mix: bool = True
    """Whether those who run can decode in the pass of a prefill, as far as the executor can tell:
    with False they wait for its end, whatever a plan says."""
    wants_mixing: bool | None = None
    """Whether they are to, where they can; None: as is to be expected of the device."""
    page_tokens: int = 1
    """Who fills the batch counts whole pages of each prompt of so many tokens."""

    @property
    def least_ttft_s(self) -> float:
        """The tightest first-token objective of late: who comes next may have it, and waits for the
        iteration's end. Infinity if there is none."""
        return self.waiting.tightest.seconds(self.now_s)

    def candidates(self) -> list[QueuedRequest]:
        """Those who wait for nothing but their turn, in queue order."""
        held = self.held
        if not held:
            return list(self.waiting)
        return [request for request in self.waiting if request.request_id not in held]


class RequestPolicy(Protocol):
    """Orders waiting requests. One object per scheduler; hooks come in the order of events."""

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:
        """`request` joined the queue: new, or retracted (then it has output tokens)."""
        ...

    def on_cached_change(self, request: QueuedRequest, now_s: float) -> None:
        """More or less of waiting `request` is cached than before, or elsewhere."""
        ...

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        """`request` left the queue to run."""
        ...

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:
        """`request` produced its last token; `request.output_tokens` says how many there were."""
        ...

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:
        """`request` is gone without an answer; it waited or ran."""
        ...

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """The first `limit` of the order, or all if there are fewer.

        Requests held are left out, or are to be computed. Must not change `state`. Called again,
        with a larger limit, if all of them were admitted.
        """
        ...

    def urgency(self, request: QueuedRequest) -> Urgency:
        """Who of those who wait is read from disk for first."""
        ...


@runtime_checkable
class ForecastingPolicy(Protocol):
    """What a policy may offer besides: it says which prefixes will be needed, and when."""

    def forecast(self, state: SchedulerState) -> DemandForecast:
        """Of those who wait, from what the last `plan` found out. Must not change `state`."""
        ...


@runtime_checkable
class UrgentFirst(Protocol):
    """What a policy may offer besides: it knows of everyone when they must start to be in time."""

    def tightest(self, limit: int) -> list[tuple[QueuedRequest, float]]:
        """Up to `limit` of those who could be in time: (request, latest start), tightest first."""
        ...

    def not_in_time(self, limit: int) -> list[tuple[QueuedRequest, float]]:
        """The same of those who are beyond hope, or have no deadline (infinity), next one first."""
        ...

    def n_in_time(self) -> int:
        """How many could be in time if each of them ran at once."""
        ...


class QuietPolicy:
    """A base for policies that only need `plan`: hears of everything and remembers nothing."""

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:
        """Nothing to remember."""

    def on_cached_change(self, request: QueuedRequest, now_s: float) -> None:
        """Nothing to remember."""

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        """Nothing to remember."""

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:
        """Nothing to remember."""

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:
        """Nothing to remember."""

    def urgency(self, request: QueuedRequest) -> Urgency:
        """In the order in which they joined the queue."""
        return 0.0, request.queued_s


PolicyFactory: TypeAlias = Callable[[], RequestPolicy]

REQUEST_POLICY_DEFAULT = "slack"
"""Who orders the waiting queue of a server that is not told otherwise."""

request_policies: Registry[PolicyFactory] = Registry("request policy")
for _name, _target in {
    "fcfs": "fcfs:FirstComeFirstServed",
    "lpm": "lpm:LongestPrefixMatch",
    "dfs-weight": "dfs_weight:DepthFirstWeight",
    "priority": "priority:PriorityFirst",
    "hrrn": "hrrn:HighestResponseRatio",
    "k-lpm": "k_lpm:OldestThenLongestPrefix",
    "edf": "edf:EarliestDeadlineFirst",
    "niyama": "niyama:Niyama",
    "sliding-serve": "sliding_serve:SlidingServe",
    "plas": "plas:LeastAttainedProgram",
    "atlas": "atlas:LeastAttainedPath",
    "program-fcfs": "program_fcfs:FirstProgramFirst",
    "pausing": "pausing:PausingPrograms",
    "slack": "slack:SlackPolicy",
}.items():
    request_policies.register(_name, f"tiered_kv.scheduler.policies.{_target}")
