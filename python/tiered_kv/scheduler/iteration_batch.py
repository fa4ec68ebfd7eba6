"""A decode batch as it is put together: what it reads, and how long that would take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_policy import RunningRequest

#: Requests that are tried one by one when the next in the order does not fit.
TRIES = 8


class Packing:
    """Requests chosen so far. A gang's shared tokens are read once, with cascade attention."""

    def __init__(self, costs: CostModel, *, is_cascade: bool) -> None:
        self.chosen: list[RunningRequest] = []
        self._costs = costs
        self._n = 0
        self._is_cascade = is_cascade
        self._context = 0
        self._saved = 0
        self._read: dict[int, int] = {}
        """Leading tokens of each gang that are read anyway."""

    @classmethod
    def of_all(
        cls, costs: CostModel, n: int, context_tokens: int, saved_tokens: int = 0
    ) -> Packing:
        """Everybody who runs, known by their number and the sum of their contexts only.

        saved_tokens: how many of these need not be read.
        """
        packing = cls(costs, is_cascade=False)
        packing._n, packing._context, packing._saved = n, context_tokens, saved_tokens
        return packing

    def __len__(self) -> int:
        return self._n

    @property
    def seconds(self) -> float:
        """Predicted duration; 0 for nobody."""
        return self._costs.iteration_s((), self._context, self._n, self._saved)

    @property
    def tokens_read(self) -> int:
        """Tokens of KV that the batch reads."""
        return self._context - self._saved

    def add(self, requests: Iterable[RunningRequest]) -> None:
        """They decode, however long that takes."""
        n_before = len(self.chosen)
        for request in requests:
            self.chosen.append(request)
            self._context += request.context_tokens
            if self._is_cascade and request.gang is not None:
                read = self._read.get(request.gang, 0)
                self._saved += min(read, request.shared_tokens)
                self._read[request.gang] = max(read, request.shared_tokens)
        self._n += len(self.chosen) - n_before

    def seconds_with(self, request: RunningRequest) -> float:
        """Predicted duration if `request` joined."""
        saved = self._saved
        if self._is_cascade and request.gang is not None:
            saved += min(self._read.get(request.gang, 0), request.shared_tokens)
        context = self._context + request.context_tokens
        return self._costs.iteration_s((), context, self._n + 1, saved)

    def fill(self, order: Sequence[RunningRequest], limit_s: float) -> list[RunningRequest]:
        """Add from the front of `order` while that takes at most `limit_s`; returns the rest.

        Where the next does not fit, some of those behind it are tried. The cost model is asked
        O(log n) times.
        """
        n = self._n_that_fit(order, limit_s)
        self.add(order[:n])
        rest = list(order[n:])
        tried = 1
        while tried < min(len(rest), TRIES):
            if self.seconds_with(rest[tried]) <= limit_s:
                self.add((rest.pop(tried),))
            else:
                tried += 1
        return rest

    def _n_that_fit(self, order: Sequence[RunningRequest], limit_s: float) -> int:
        """How many of the front of `order` fit together. A longer front takes longer."""
        sums = self._running_sums(order)
        low, high = 0, len(order)
        while low < high:
            middle = (low + high + 1) // 2
            context, saved = sums[middle - 1]
            n = self._n + middle
            if self._costs.iteration_s((), context, n, saved) <= limit_s:
                low = middle
            else:
                high = middle - 1
        return low

    def _running_sums(self, order: Sequence[RunningRequest]) -> list[tuple[int, int]]:
        """(context tokens, saved tokens) with the first, the first two, and so on."""
        context, saved = self._context, self._saved
        if not self._is_cascade:
            return [((context := context + request.context_tokens), saved) for request in order]
        read: dict[int, int] = dict(self._read)
        sums = []
        for request in order:
            context += request.context_tokens
            if request.gang is not None:
                already = read.get(request.gang, 0)
                saved += min(already, request.shared_tokens)
                read[request.gang] = max(already, request.shared_tokens)
            sums.append((context, saved))
        return sums


def with_gangs(order: Sequence[RunningRequest]) -> list[RunningRequest]:
    """`order` with every member of a gang moved up behind the first of them."""
    members: dict[int, list[RunningRequest]] = {}
    for request in order:
        if request.gang is not None:
            members.setdefault(request.gang, []).append(request)
    grouped: list[RunningRequest] = []
    for request in order:
        if request.gang is None:
            grouped.append(request)
        else:
            grouped.extend(members.pop(request.gang, ()))
    return grouped
