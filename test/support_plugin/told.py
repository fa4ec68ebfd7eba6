"""An iteration policy that does as it is told, and small requests for it to choose among."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support_plugin.decode_requests import Kind
from tiered_kv.scheduler.iteration_policy import IterationPlan, IterationState, RunningTotals


class Told:
    """Does as it is told; remembers what it is asked."""

    def __init__(self) -> None:
        self.states: list[IterationState] = []
        self.decode: Callable[[list[int]], list[int]] | None = None
        self.swap_out: Callable[[IterationState], list[int]] = lambda state: []
        self.everyone_fits = False

    def fits(self, totals: RunningTotals, costs: Any, now_s: float) -> bool:
        return self.everyone_fits

    def plan(self, state: IterationState) -> IterationPlan:
        self.states.append(state)
        if state.short_tokens:
            return IterationPlan(swap_out=tuple(self.swap_out(state)))
        ids = [request.request_id for request in state.running]
        if self.decode is None:
            return IterationPlan()
        return IterationPlan(tuple(self.decode(ids)))


def kind(seed: int, n_new: int = 12, **fields: Any) -> Kind:
    fields.setdefault("sampling", {"ignore_eos": True})
    return Kind(family=0, seed=seed, n_own=6, max_new_tokens=n_new, **fields)


def turns(n: int) -> Callable[[], bool]:
    """True so many times."""
    left = iter(range(n))
    return lambda: next(left, None) is not None
