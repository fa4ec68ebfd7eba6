"""One clock for all ranks of a scheduler: rank 0 reads it, and the others are told with requests.

Ranks that decide by clocks of their own would part, and wait for each other in a collective for
ever (docs/scheduler.md). So rank 0 appends a tick to the requests that it broadcasts anyway
(managers/scheduler_components/request_receiver.py), and every rank takes it off again. Time is that
of rank 0's `time.perf_counter`, in seconds, which is also what SGLang stamps requests with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import (
    BatchTokenizedGenerateReqInput,
    TokenizedGenerateReqInput,
    unwrap_from_pickle,
)

#: A request cannot have been on its way for longer: such a stamp is from another clock.
AGE_MAX_S = 600.0
#: Arrivals that are kept until they are asked for; the oldest go first.
ARRIVALS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Tick:
    """What rank 0 tells: the time, and when the requests that come with it were received."""

    now_s: float
    arrivals_s: Mapping[str, float] = field(default_factory=dict)
    """By request id; only of requests whose client's server process noted it."""


class SharedClock:
    """The time as of the last tick.

    wanted: whether anybody needs the time now; asked on rank 0 only, so that an idle server
    broadcasts nothing. on_tick: called after every tick, on every rank.
    """

    def __init__(self, wanted: Callable[[], bool], on_tick: Callable[[], None]) -> None:
        self.now_s = 0.0
        self._arrivals_s: dict[str, float] = {}
        self._wanted = wanted
        self._on_tick = on_tick

    def also_wanted(self, wanted: Callable[[], bool]) -> None:
        """Somebody else needs the time as well, whenever `wanted`; asked on rank 0 only."""
        before = self._wanted
        self._wanted = lambda: before() or wanted()

    def read(self, received: Iterable[Any]) -> Tick | None:
        """The tick that goes with what rank 0 received, or None if there is no need for one."""
        requests = list(_generate_requests(received))
        if not requests and not self._wanted():
            return None
        now_s = time.perf_counter()
        arrivals_s = {r.rid: at for r in requests if (at := _created_s(r, now_s)) is not None}
        return Tick(now_s, arrivals_s)

    def take(self, tick: Tick) -> None:
        """A tick has come."""
        self.now_s = tick.now_s
        # Not all are asked for at once: a request may have to wait for its grammar, or be refused.
        self._arrivals_s.update(tick.arrivals_s)
        while len(self._arrivals_s) > ARRIVALS_MAX:
            del self._arrivals_s[next(iter(self._arrivals_s))]
        self._on_tick()

    def arrival_s(self, rid: str) -> float:
        """When the server received this request: told by its tick, or now."""
        return self._arrivals_s.pop(rid, self.now_s)


# By the id of SGLang's receiver, which has no room for an attribute. One scheduler, one receiver.
_clocks: dict[int, SharedClock] = {}


def attach(receiver: Any, clock: SharedClock) -> None:
    """Have `receiver` carry the ticks of `clock`."""
    _clocks[id(receiver)] = clock


def carry_tick(
    original: Callable[..., list[Any]],
    receiver: Any,
    recv_reqs: list[Any] | None,
    *args: Any,
    **kwargs: Any,
) -> list[Any]:
    """AROUND `SchedulerRequestReceiver._broadcast_reqs_across_ranks`.

    `recv_reqs` is None on every rank but the one that broadcasts.
    """
    clock = _clocks.get(id(receiver))
    if clock is None:
        return original(receiver, recv_reqs, *args, **kwargs)
    if recv_reqs is not None:
        tick = clock.read(recv_reqs)
        if tick is not None:
            recv_reqs = [*recv_reqs, tick]
    received = original(receiver, recv_reqs, *args, **kwargs)
    # What SGLang adds itself comes after it.
    for at in range(len(received) - 1, -1, -1):
        if isinstance(received[at], Tick):
            clock.take(received.pop(at))
            break
    return received


def keep_tick_with_work(
    original: Callable[..., tuple[list[Any], list[Any]]], receiver: Any, *args: Any, **kwargs: Any
) -> tuple[list[Any], list[Any]]:
    """AROUND `SchedulerRequestReceiver._split_work_and_control_reqs`, of DP attention.

    What is work goes to the ranks that have the same requests; all else comes from the first of
    all ranks.
    """
    work, control = original(receiver, *args, **kwargs)
    ticks = [item for item in control if isinstance(item, Tick)]
    return work + ticks, [item for item in control if not isinstance(item, Tick)]


def send_creation_time(state: dict[str, Any], stats: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `APIServerReqTimeStats.__getstate__`: a request's state on its way to the scheduler.

    SGLang leaves the times out that it has no use for there, and converts those that come.
    """
    state["created_time"] = stats.created_time


def _generate_requests(received: Iterable[Any]) -> Iterable[Any]:
    for item in received:
        if isinstance(item, TokenizedGenerateReqInput):
            yield item
        elif isinstance(item, BatchTokenizedGenerateReqInput):
            yield from item


def _created_s(request: Any, now_s: float) -> float | None:
    stats = unwrap_from_pickle(request.time_stats)
    created_s = float(getattr(stats, "created_time", 0.0))
    return created_s if now_s - AGE_MAX_S < created_s <= now_s else None
