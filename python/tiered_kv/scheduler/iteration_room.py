"""What the decodes that an iteration policy chose leave to prefill, and who waits for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from tiered_kv.scheduler.first_tokens import HURRY_SHARE, is_queue_late
from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import IterationState
from tiered_kv.scheduler.plan import PrefillRoom
from tiered_kv.scheduler.prefill_room import (
    MIN_CHUNK_TOKENS,
    WORTH_SHARE,
    Decodes,
    MeanPace,
    begun_tokens,
    room_before,
    room_beside,
)
from tiered_kv.scheduler.prompts_ahead import PromptsAhead

#: Beside decodes far into a long prompt so few tokens take longer than these, and are worth it.
LEAST_TOKENS = 64


class IterationRoom:
    """For one plan: `prefill_room.py` asked for decodes of everyone, or of a part."""

    def __init__(self, state: IterationState, config: IterationConfig) -> None:
        self._state, self._config = state, config
        self._prefill = state.prefill
        self._ahead: PromptsAhead | None = None
        if state.prefill is not None and not state.is_mixed:
            self._ahead = state.ahead or PromptsAhead(state.prefill) or None

    def room(
        self, batch: Packing, needed_s: float, left_s: float, *, is_everyone: bool
    ) -> tuple[PrefillRoom | None, bool]:
        """For the iteration in which, or before which, `batch` decodes.

        needed_s: of the decode that has to follow a prefill which runs alone. left_s: seconds until
        the first of its tokens is due. Returns as well whether first tokens would be late at that
        pace, which need not be: then the request policy alone says what room there is.
        """
        prefill, config = self._prefill, self._config
        if prefill is None:
            return None, False
        chunks: Sequence[tuple[int, int]]
        if self._state.is_mixed:
            decodes, cached = Decodes(batch, needed_s, left_s), begun_tokens(prefill)
            tokens = room_beside(prefill, decodes, config, LEAST_TOKENS).tokens(cached)
            room, chunks = PrefillRoom(tokens), ((tokens, cached),)
        elif self._ahead is None:
            return None, False
        else:
            # Who is parked leaves the room that everybody's decodes would have to gain.
            mean = partial(MeanPace.of, prefill, needed_s) if is_everyone else None
            decodes = Decodes(batch, needed_s, left_s, mean)
            room, piece = room_before(prefill, self._ahead, decodes, config)
            chunks = () if piece is None else piece.chunks
        if config.yields and chunks and is_queue_late(prefill, chunks, needed_s):
            return None, True
        return room, False

    def is_hurried(self, all_s: float) -> bool:
        """Whether throughput counts more than token objectives, for the sake of who waits.

        That is so if first tokens need more than a share of the time they have, even if everybody
        decodes, in `all_s`, between two prefills: whoever is parked decodes later, at a higher
        price.
        """
        prefill, ahead = self._prefill, self._ahead
        if prefill is None:
            return self._state.is_hurried
        if self._state.is_mixed:
            # A pass that leaves somebody out is one that computes less of the prompts, too.
            return True
        if ahead is None:
            return False
        worth = ahead.worth_a_pass(WORTH_SHARE, MIN_CHUNK_TOKENS)
        return is_queue_late(prefill, worth.chunks, all_s, HURRY_SHARE)


def share_of(needed_s: float, left_s: float, others: Sequence[object], share: float) -> float:
    """`left_s`, less what is kept for `others` who decode if there is time."""
    if not others or math.isinf(left_s):
        return left_s
    return left_s - (1.0 - share) * max(0.0, left_s - needed_s)
