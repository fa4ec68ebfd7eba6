"""A workload for a fleet: samples of one workload, each with users of its own.

What many of the recorded requests begin with (tools and system prompt of one application) is the
same for all of them; what one user wrote is not.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request, Workload, whole_blocks

SHARED_BY = 0.01
"""Blocks that at least this share of the initial requests have are shared by all copies."""

_COPY = 1 << 40
"""Ids of blocks, requests and sessions of one copy; a workload's own are smaller."""


class TiledWorkload:
    """`n_copies` of `inner`, shifted against each other by up to `shift_s` seconds.

    share: of the conversations of `inner`, how many each copy has; others in each. Requests that
    `inner` says no session of are taken to go on with the conversation of which they hold a whole
    former prompt. `inner` must keep no account of its requests: several copies have the same.
    """

    def __init__(
        self,
        inner: Workload,
        n_copies: int,
        shift_s: float,
        *,
        share: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Raises WorkloadError unless there is at least one copy."""
        if n_copies < 1:
            raise WorkloadError(f"A workload has at least 1 copy, not {n_copies}.")
        self.name = f"{n_copies} x {inner.name}"
        self.block_tokens = inner.block_tokens
        self._inner = inner
        initial = list(inner.initial())
        uses = Counter(block for request in initial for block in request.blocks)
        least = max(2.0, SHARED_BY * len(initial))
        shared = {block for block, n in uses.items() if n >= least}
        self._shared = np.array(sorted(shared), dtype=np.int64)
        self._initial = conversations(initial, shared, inner.block_tokens)
        names = sorted(
            {request.session for request in self._initial if request.session is not None}
        )
        random = np.random.default_rng([seed, 13])
        self._shifts_s = random.random(n_copies) * shift_s
        self._chosen = [
            {names[at] for at in np.flatnonzero(random.random(len(names)) < share)}
            for _ in range(n_copies)
        ]

    def initial(self) -> Iterator[Request]:
        """All copies' initial requests, by arrival."""
        return heapq.merge(
            *(self._copy(number) for number in range(len(self._shifts_s))),
            key=lambda request: request.arrival_s,
        )

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """What the inner workload says of the copy's request."""
        number, request_id = divmod(finished.request_id, _COPY)
        request = self._inner.follow_up(replace(finished, request_id=request_id), finish_s)
        if request is None:
            return None
        if request.session is None:
            request = replace(request, session=request.request_id)
        return self._of(number, request)

    def _copy(self, number: int) -> Iterator[Request]:
        shift_s, chosen = float(self._shifts_s[number]), self._chosen[number]
        for request in self._initial:
            if request.session in chosen:
                copied = self._of(number, request)
                copied.arrival_s += shift_s
                yield copied

    def _of(self, number: int, request: Request) -> Request:
        assert request.session is not None
        return replace(
            request,
            request_id=number * _COPY + request.request_id,
            session=number * _COPY + request.session,
            blocks=self._own(number, request.blocks),
            output_blocks=self._own(number, request.output_blocks),
        )

    def _own(self, number: int, blocks: array[int]) -> array[int]:
        if not blocks:
            return blocks
        ids = np.frombuffer(blocks, dtype=np.int64)
        own = np.where(np.isin(ids, self._shared), ids, ids + number * _COPY)
        return array("q", own.tobytes())


def conversations(
    requests: Iterable[Request], shared: set[int], block_tokens: int
) -> list[Request]:
    """`requests`, in the order of arrival, each with its session; `shared` blocks name none."""
    found: list[Request] = []
    session_after: dict[int, int] = {}
    for request in requests:
        own = [block for block in whole_blocks(request, block_tokens) if block not in shared]
        session = request.session
        if session is None:
            known = (session_after[block] for block in reversed(own) if block in session_after)
            session = next(known, request.request_id)
        if own:
            session_after[own[-1]] = session
        found.append(replace(request, session=session))
    return found
