"""Runs a workload through simulated instances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.instance import Instance
from tiered_kv.simulation.live import LiveRequest, RequestRecord
from tiered_kv.simulation.policies import make_policies
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.shared_store import SharedStore
from tiered_kv.simulation.timeline import Timeline
from tiered_kv.simulation.workload.request import Request, Workload

Router = Callable[[Request, Sequence[Instance]], int]
"""Picks the instance, by its index, that gets a request."""

Progress = Callable[[int], None]
"""Told how many requests more have been answered or refused."""


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What one link carried."""

    n_bytes: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Everything that happened; `records` in the order of arrival."""

    records: list[RequestRecord]
    end_s: float
    """When the last event happened, in seconds since the start."""
    n_iterations: int
    busy_s: float
    """Seconds, summed over instances, in which a forward pass ran."""
    n_retractions: int
    n_swaps: int
    processed_prefill_tokens: int
    links: dict[str, LinkUse]


def first_instance(request: Request, instances: Sequence[Instance]) -> int:  # noqa: ARG001
    """The router for a single instance."""
    return 0


class Simulation:
    """One workload, one or more instances with equal settings, one virtual clock."""

    def __init__(
        self,
        workload: Workload,
        settings: InstanceSettings,
        *,
        n_instances: int = 1,
        router: Router = first_instance,
        seed: int = 0,
        timeline: Timeline | None = None,
    ) -> None:
        """`seed` is for the noise; the workload has its own. Raises ConfigError for bad names."""
        self._workload = workload
        self._router = router
        self._events = EventQueue()
        self._records: list[RequestRecord] = []
        self._progress: Progress = _no_progress
        self.instances = []
        self.shared = _shared_store(workload, settings)
        for index in range(n_instances):
            policies = make_policies(workload, settings)
            self.instances.append(
                Instance(
                    settings,
                    workload.block_tokens,
                    self._events,
                    policies,
                    self._finished,
                    seed=seed + index,
                    timeline=timeline,
                    shared=self.shared,
                )
            )

    def run(self, progress: Progress | None = None) -> SimulationResult:
        """Until every request was answered or refused."""
        if progress is not None:
            self._progress = progress
        self._initial = self._workload.initial()
        self._schedule_next()
        fire_next = self._events.fire_next
        while fire_next():
            pass
        return self._result()

    def _schedule_next(self) -> None:
        """One initial request is in the event queue at a time: workloads may be long."""
        request = next(self._initial, None)
        if request is None:
            return

        def arrive(now_s: float) -> None:
            self._schedule_next()
            self._arrive(request, now_s)

        self._events.schedule(request.arrival_s, arrive)

    def _arrive(self, request: Request, now_s: float) -> None:
        self.instances[self._router(request, self.instances)].arrive(request, now_s)

    def _finished(self, live: LiveRequest, now_s: float) -> None:
        self._records.append(live.record)
        self._progress(1)
        request = self._workload.follow_up(live.request, now_s)
        if request is not None:
            following = request
            self._events.schedule(following.arrival_s, lambda at_s: self._arrive(following, at_s))

    def _result(self) -> SimulationResult:
        self._records.sort(key=lambda record: (record.arrival_s, record.request_id))
        links: dict[str, LinkUse] = {}
        for instance in self.instances:
            cache = instance.cache
            for link in cache.links:
                before = links.get(link.name, LinkUse(0, 0.0))
                links[link.name] = LinkUse(
                    before.n_bytes + link.n_bytes, before.busy_s + link.busy_s
                )
        return SimulationResult(
            records=self._records,
            end_s=self._events.now(),
            n_iterations=sum(instance.n_iterations for instance in self.instances),
            busy_s=sum(instance.busy_s for instance in self.instances),
            n_retractions=sum(instance.departures.n_retracted for instance in self.instances),
            n_swaps=sum(instance.departures.n_swapped for instance in self.instances),
            processed_prefill_tokens=sum(
                instance.processed_prefill_tokens for instance in self.instances
            ),
            links=links,
        )


def _shared_store(workload: Workload, settings: InstanceSettings) -> SharedStore | None:
    spec = settings.cache.shared
    if spec is None:
        return None
    block_bytes = int(settings.model.kv_bytes_per_token * workload.block_tokens)
    return SharedStore(spec.capacity_bytes, block_bytes)


def _no_progress(n: int) -> None:
    """Nobody watches."""
