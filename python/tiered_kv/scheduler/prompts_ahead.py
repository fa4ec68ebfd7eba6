"""The prompts that wait, cut into pieces that a pass of their own could compute.

A piece is priced by the requests in it: each reads what is cached before it, so sixteen that add 16
tokens to 2,048 cached ones are not a prompt of 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.request_policy import SchedulerState

#: So many of those who wait are looked at.
PROMPTS_LOOK = 64
#: Prompts are cut to this precision.
STEP_TOKENS = 64


@dataclass(frozen=True)
class Piece:
    """The first tokens of what waits."""

    chunks: tuple[tuple[int, int], ...]
    """(new, cached) tokens of each request."""
    n_admitted: int
    """How many of these are waiting still, not begun."""
    costs: CostModel

    @property
    def tokens(self) -> int:
        return sum(new for new, _ in self.chunks)

    @cached_property
    def seconds(self) -> float:
        """Of a pass that computes it and nothing else."""
        return self.costs.iteration_s(self.chunks, 0, 0)

    @cached_property
    def marginal_s(self) -> float:
        """What it adds to a pass that takes place anyway."""
        return sum(self.costs.marginal_prefill_s(new, cached) for new, cached in self.chunks)


class PromptsAhead:
    """What one pass could compute: the prompt that was begun, then those who wait, by arrival.

    The order of admission may be another one; then a piece is an estimate of what will be in it.
    """

    def __init__(self, state: SchedulerState) -> None:
        self._costs = state.costs
        self._chunks: list[tuple[int, int]] = []
        self._n_begun = 0
        left = state.chunk_tokens
        unfinished = state.unfinished
        if unfinished is not None:
            self._n_begun = 1
            new = min(left, max(1, unfinished.unprefilled_tokens))
            self._chunks.append((new, unfinished.prefilled_tokens))
            left -= new
        for request in state.waiting:
            if left <= 0 or len(self._chunks) >= PROMPTS_LOOK:
                break
            if request.request_id not in state.held:
                new = min(left, request.uncached_tokens)
                self._chunks.append((new, request.cached_tokens))
                left -= new
        self._sizes = self._possible_sizes()
        self._pieces: dict[int, Piece] = {}

    def __bool__(self) -> bool:
        return bool(self._chunks)

    @cached_property
    def whole(self) -> Piece:
        """All of it."""
        return self._piece(self._sizes[-1])

    def within(self, seconds: float) -> Piece | None:
        """The largest piece whose pass takes at most `seconds`; None if there is none."""
        if self.whole.seconds <= seconds:
            return self.whole
        low, high = 0, len(self._sizes) - 1
        while low < high:
            middle = (low + high) // 2
            if self._piece(self._sizes[middle]).seconds <= seconds:
                low = middle + 1
            else:
                high = middle
        return self._piece(self._sizes[low - 1]) if low else None

    def worth_a_pass(self, share: float) -> Piece:
        """The least (doubled) in pieces of which all of it takes at most `share` longer."""
        whole = self.whole
        most_s = (1.0 + share) * whole.seconds
        at = 1
        while at < len(self._sizes):
            piece = self._piece(self._sizes[at - 1])
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
        for new, _ in self._chunks:
            sizes += range(start + STEP_TOKENS, start + new, STEP_TOKENS)
            start += new
            sizes.append(start)
        return sizes

    def _piece(self, tokens: int) -> Piece:
        """The same object each time: what it takes is predicted once."""
        piece = self._pieces.get(tokens)
        if piece is None:
            piece = self._pieces[tokens] = self._cut(tokens)
        return piece

    def _cut(self, tokens: int) -> Piece:
        chunks, left = [], tokens
        for new, cached in self._chunks:
            if left <= 0:
                break
            chunks.append((min(new, left), cached))
            left -= new
        return Piece(tuple(chunks), max(0, len(chunks) - self._n_begun), self._costs)
