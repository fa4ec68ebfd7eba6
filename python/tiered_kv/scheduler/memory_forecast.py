"""Will they fit to their end? Admission by predicted peak memory (Past-Future, arXiv 2507.10150).

The length of an answer is not known, but the lengths of past answers of the same class are. A
request that has produced n tokens is predicted to reach a quantile of those past lengths that
exceed n. Requests give their memory back as they finish, the shortest remainder first, so the
peak is the largest of the sums at those moments. If the peak fits, nobody has to be retracted,
unless answers turn out longer than the quantile.

A prefix that several share is there once. So a request is counted with what it adds to the device:
what that lacks of it, and of what it has, the part that could be evicted otherwise. The rest is
pinned by others, and is not given back when one of them ends.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState


class OutputLengths:
    """The latest lengths of answers by class."""

    def __init__(self, window: int = 500, least: int = 20) -> None:
        """`window`: lengths kept per class. `least`: below so many, all classes count together."""
        self._window = window
        self._least = least
        self._latest: dict[str, deque[int]] = {}
        self._sorted: dict[str, list[int]] = {}

    def observe(self, request: QueuedRequest) -> None:
        """It is finished, with `output_tokens` tokens."""
        for name in (request.slo.slo_class, ""):
            latest = self._latest.setdefault(name, deque())
            lengths = self._sorted.setdefault(name, [])
            latest.append(request.output_tokens)
            insort(lengths, request.output_tokens)
            if len(latest) > self._window:
                del lengths[bisect_right(lengths, latest.popleft()) - 1]

    def total(self, request: QueuedRequest, quantile: float) -> int:
        """Tokens it will have produced in the end: at least one more than now, at most its limit.

        What the caller expects counts until it is exceeded. Without any experience, its limit.
        """
        produced, limit = request.output_tokens, request.max_new_tokens
        hint = request.expected_output_tokens
        if hint is not None and hint > produced:
            return max(produced + 1, min(hint, limit))
        lengths = self._sorted.get(request.slo.slo_class, [])
        if len(lengths) < self._least:
            lengths = self._sorted.get("", [])
        if len(lengths) < self._least:
            return max(produced + 1, limit)
        first = bisect_right(lengths, produced)
        if first == len(lengths):
            return max(produced + 1, min(2 * produced, limit))
        at = first + int(quantile * (len(lengths) - first))
        return max(produced + 1, min(lengths[min(at, len(lengths) - 1)], limit))


def peak_tokens(futures: Iterable[tuple[int, int]]) -> int:
    """The most KV tokens that are held at any moment from now on.

    futures: (tokens held now, tokens still to come) of each request; all grow by one a step and
    give everything back at their end. O(n log n).
    """
    held = peak = 0
    # The longest remainder first: when the i-th ends, those before it are still there.
    for n_before, (now, left) in enumerate(sorted(futures, key=lambda f: -f[1]), start=1):
        held += now
        peak = max(peak, held + n_before * left)
    return peak


def admissible(
    running: Sequence[tuple[int, int]], candidates: Sequence[tuple[int, int]], capacity_tokens: int
) -> int:
    """How many of `candidates`, in order, can join `running` so that the peak fits.

    Both as in `peak_tokens`. O((running + candidates) x log of them), by bisection: the peak grows
    with every candidate.
    """
    everyone = [*running, *candidates]
    if sum(now + left for now, left in everyone) <= capacity_tokens:
        return len(candidates)
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high + 1) // 2
        if peak_tokens(everyone[: len(running) + middle]) <= capacity_tokens:
            low = middle
        else:
            high = middle - 1
    return low


class MemoryForecast:
    """How many of the next requests fit to their end, by what past answers were like."""

    def __init__(self, quantile: float, margin: float) -> None:
        """`quantile` of past lengths that is predicted; `margin`: share of the pool left free."""
        self.lengths = OutputLengths()
        self._quantile = quantile
        self._margin = margin
        self._totals: dict[int, int] = {}

    def finished(self, request: QueuedRequest) -> None:
        """It has its last token."""
        self.forget(request.request_id)
        self.lengths.observe(request)

    def forget(self, request_id: int) -> None:
        """It does not run any more."""
        self._totals.pop(request_id, None)

    def admit_at_most(self, state: SchedulerState, order: Sequence[QueuedRequest]) -> int | None:
        """How many of `order` may be admitted; None if nothing is known about memory.

        At least one if nobody runs: whether that one fits is then up to the pool itself.
        """
        if state.available_tokens is None or not order:
            return None
        running = [self._future(request) for request in state.running]
        held = sum(own for own, _ in running)
        if state.unfinished is not None:
            running.append(self._future(state.unfinished))
            held += max(0, state.unfinished.prefilled_tokens - state.unfinished.device_tokens)
        candidates, claimed = [], set[Node]()
        for request in order:
            left = self.lengths.total(request, self._quantile) - request.output_tokens
            own = _own_tokens(request) + _claim(request, claimed, state.waiting.tokens_per_unit)
            candidates.append((own, left))
        capacity = int((held + state.available_tokens) * (1.0 - self._margin))
        n = admissible(running, candidates, capacity)
        return n if running else max(n, 1)

    def _future(self, request: QueuedRequest) -> tuple[int, int]:
        """(tokens held besides the cached prefix, tokens to come) of a request that runs.

        Predicted once, and again when it turns out longer: per step, that is a look-up.
        """
        produced = request.output_tokens
        total = self._totals.get(request.request_id, 0)
        if total <= produced:
            total = self.lengths.total(request, self._quantile)
            self._totals[request.request_id] = total
        return _own_tokens(request), total - produced


def _own_tokens(request: QueuedRequest) -> int:
    """What the device lacked of it when it was last looked up; since then it holds that."""
    return request.prompt_tokens + request.output_tokens - request.device_tokens


def _claim(request: QueuedRequest, claimed: set[Node], tokens_per_unit: int) -> int:
    """Tokens of its cached prefix that nobody holds yet, and that it would. Added to `claimed`."""
    units = 0
    for node in request.device_path:
        if node not in claimed and not node.records[Tier.DEVICE].pins:
            claimed.add(node)
            units += node.n_tokens
    inside = request.inside
    if inside is not None and inside not in claimed and not inside.records[Tier.DEVICE].pins:
        # Left unclaimed: others may go through all of it.
        units += max(0, request.device_units - inside.start)
    return units * tokens_per_unit
