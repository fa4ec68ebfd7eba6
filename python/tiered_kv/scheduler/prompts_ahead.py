"""The prompts that wait, cut into pieces that a pass of their own could compute.

A piece is priced by the requests in it: each reads what is cached before it, so sixteen that add 16
tokens to 2,048 cached ones are not a prompt of 256.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.cost_search import most_within
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.waiting import QUEUE_LOOK

#: Prompts are cut, and chunks found, to this precision.
STEP_TOKENS = 64


class QueueState(Protocol):
    """What is read of `SchedulerState`."""

    @property
    def costs(self) -> CostModel: ...
    @property
    def waiting(self) -> Iterable[QueuedRequest]: ...
    @property
    def held(self) -> Container[int]: ...
    @property
    def unfinished(self) -> QueuedRequest | None: ...
    @property
    def chunk_tokens(self) -> int: ...
    @property
    def page_tokens(self) -> int: ...


@dataclass(frozen=True)
class Piece:
    """The first tokens of what waits."""

    chunks: tuple[tuple[int, int], ...]
    """(new, cached) tokens of each request."""
    n_admitted: int
    """How many of these are waiting still, not begun."""
    tokens: int
    marginal_s: float
    """What it adds to a pass that takes place anyway."""
    costs: CostModel

    @cached_property
    def seconds(self) -> float:
        """Of a pass that computes it and nothing else."""
        return self.costs.iteration_s(self.chunks, 0, 0)


class PromptsAhead:
    """What one pass could compute: the prompt that was begun, then those who wait.

    First those that are known to be next, then by arrival. The order of admission may be another
    one; then a piece is an estimate of what will be in it.
    """

    def __init__(
        self,
        state: QueueState,
        first: Sequence[QueuedRequest] = (),
        *,
        goes_on: bool = True,
    ) -> None:
        """first: who is admitted first, as far as that is known. goes_on: whether the prompt that
        was begun does.
        """
        self._costs = state.costs
        self._chunks: list[tuple[int, int]] = []
        self._n_begun = 0
        self._page_tokens = state.page_tokens
        left = state.chunk_tokens
        unfinished = state.unfinished
        if unfinished is not None and goes_on:
            self._n_begun = 1
            new = min(left, max(1, unfinished.unprefilled_tokens))
            self._chunks.append((new, unfinished.prefilled_tokens))
            left -= new
        for request in _in_order(first, state):
            if left <= 0 or len(self._chunks) >= QUEUE_LOOK:
                break
            new = min(left, request.uncached_tokens)
            self._chunks.append((new, request.cached_tokens))
            left -= new
        self._ends = list(accumulate(new for new, _ in self._chunks))
        self._sizes = self._possible_sizes()
        self._pieces: dict[int, Piece] = {}

    def __bool__(self) -> bool:
        return bool(self._chunks)

    @cached_property
    def whole(self) -> Piece:
        """All of it."""
        return self._piece(self._sizes[-1])

    @property
    def first(self) -> Piece:
        """The first prompt, as much of it as the longest pass has room for."""
        return self._piece(self._chunks[0][0])

    def in_pages(self, piece: Piece) -> int:
        """Its tokens, as who fills the batch counts them: whole pages of each who is admitted."""
        return piece.tokens + (self._page_tokens - 1) * piece.n_admitted

    def within(self, seconds: float) -> Piece | None:
        """The largest piece whose pass takes at most `seconds`; None if there is none."""
        whole_s = self.whole.seconds
        if whole_s <= seconds:
            return self.whole
        sizes, low, high = self._sizes, 0, len(self._sizes) - 1
        low_s, high_s = 0.0, whole_s
        # Between those whose price is known already.
        for tokens, piece in self._pieces.items():
            if piece.seconds <= seconds:
                if tokens > low:
                    low, low_s = tokens, piece.seconds
            elif piece.seconds < high_s:
                high, high_s = bisect_left(sizes, tokens), piece.seconds
        low = bisect_left(sizes, low) if low else -1
        if low < 0:
            low, low_s = 0, self._piece(sizes[0]).seconds
            if low_s > seconds:
                return None

        def cost_s(n_steps: int) -> float:
            return self._piece(sizes[low + n_steps]).seconds

        n_steps = most_within(cost_s, seconds, high - low, low_s, high_s)
        return self._piece(sizes[low + n_steps])

    def worth_a_pass(self, share: float, floor: int = 0) -> Piece:
        """The least (doubled) in pieces of which all of it takes at most `share` longer.

        floor: no prompt is cut to fewer tokens for that; the first one, if it has fewer, is whole.
        """
        whole, sizes = self.whole, self._sizes
        most_s = (1.0 + share) * whole.seconds
        at = bisect_left(sizes, min(floor, self._chunks[0][0])) + 1
        while at < len(sizes):
            piece = self._piece(sizes[at - 1])
            n_pieces = -(-whole.tokens // piece.tokens)
            # Each pass costs what it takes beyond its tokens' own work.
            if whole.marginal_s + n_pieces * (piece.seconds - piece.marginal_s) <= most_s:
                return piece
            at *= 2
        return whole

    def _possible_sizes(self) -> Sequence[int]:
        """Tokens at which a piece may end, ascending."""
        sizes: list[int] = []
        start = 0
        for end in self._ends:
            sizes += range(start + STEP_TOKENS, end, STEP_TOKENS)
            sizes.append(end)
            start = end
        return sizes

    def _piece(self, tokens: int) -> Piece:
        """The same object each time: what it takes is predicted once."""
        piece = self._pieces.get(tokens)
        if piece is None:
            piece = self._pieces[tokens] = self._cut(tokens)
        return piece

    def _cut(self, tokens: int) -> Piece:
        n = bisect_left(self._ends, tokens)
        new, cached = self._chunks[n]
        new -= self._ends[n] - tokens
        marginal_s = self._costs.marginal_prefill_s(new, cached)
        if n:
            marginal_s += self._marginals_s[n - 1]
        chunks = (*self._chunks[:n], (new, cached))
        return Piece(chunks, max(0, n + 1 - self._n_begun), tokens, marginal_s, self._costs)

    @cached_property
    def _marginals_s(self) -> list[float]:
        """Of the first prompt, the first two, and so on."""
        cost_s = self._costs.marginal_prefill_s
        return list(accumulate(cost_s(new, cached) for new, cached in self._chunks))


def _in_order(first: Sequence[QueuedRequest], state: QueueState) -> Iterator[QueuedRequest]:
    yield from first
    named = {request.request_id for request in first}
    for request in state.waiting:
        if request.request_id not in named and request.request_id not in state.held:
            yield request
