"""The beginnings of sessions: many of them load a server sooner than a few whole ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request, Workload


class FirstTurns:
    """`inner` with sessions that end after `n_turns` calls."""

    def __init__(self, inner: Workload, n_turns: int) -> None:
        """Raises WorkloadError unless `n_turns` is at least 1."""
        if n_turns < 1:
            raise WorkloadError(f"A session has at least 1 call, not {n_turns}.")
        self.name = inner.name
        self.block_tokens = inner.block_tokens
        self._inner = inner
        self._n_turns = n_turns
        self._turn: dict[int, int] = {}

    def initial(self) -> Iterator[Request]:
        """The inner workload's initial requests; each is the first call of its session."""
        self._turn = {}
        for request in self._inner.initial():
            yield self._counted(request, 1)

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """What the inner workload says, until the session has had its calls."""
        turn = self._turn.pop(finished.request_id)
        if turn >= self._n_turns:
            return None
        request = self._inner.follow_up(finished, finish_s)
        return None if request is None else self._counted(request, turn + 1)

    def _counted(self, request: Request, turn: int) -> Request:
        self._turn[request.request_id] = turn
        if turn < self._n_turns:
            return request
        return replace(request, next_use_hint_s=None)
