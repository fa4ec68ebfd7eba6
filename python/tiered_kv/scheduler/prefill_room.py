"""How much is prefilled before, or beside, the next decode: the one rule for prefill's turn.

Whoever plans asks here: a request policy for a decode of everyone who runs, which is the packing of
all, an iteration policy for the part that it chose. A prefill ends before any of these is due its
next token (Niyama's and Sarathi's chunks by slack), and is short against the tightest first-token
objective: who arrives meanwhile waits for its end. Nobody may arrive, though, so for that alone
prompts are not cut so small that they take longer. Where prefill runs alone,

- it has its turn after each decode, whatever time that leaves: half of a decode's, and at least
  what is worth a pass. Else nobody would be admitted while decoding takes all that its objectives
  allow. While nobody who waits is in a hurry, less than that will do, so that decodes come sooner;
- but where a few decodes gain enough time for a prefill that is worth a pass, it waits for them,
  unless the first prompt fits whole.

Where it runs beside the decodes these go on in any case, and the chunk is no smaller than what is
worth a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from tiered_kv.scheduler.cost_search import most_within
from tiered_kv.scheduler.first_tokens import HURRY_SHARE, is_queue_late
from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.plan import NO_LIMIT, PrefillRoom
from tiered_kv.scheduler.prefill_turns import PrefillTurns
from tiered_kv.scheduler.prompts_ahead import STEP_TOKENS, Piece, PromptsAhead
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.slack import least_token_slack_s

#: Fewer tokens of a longer prompt are not worth a pass of their own.
MIN_CHUNK_TOKENS = 256
#: Nor are so few that prompts take so much longer, as a share, in pieces of that size.
WORTH_SHARE = 0.15
#: Prompts may take so much longer, as a share, for being cut up for those who may arrive.
CUTTING_SHARE = 0.03
#: Or in pieces that let decodes come sooner, while nobody who waits is in a hurry.
PATIENT_SHARE = 1.0
#: Prefill waits for at most so many decodes in a row that gain it room.
DECODES_AHEAD = 4
#: Of the time until the next token is due, this share is used: predictions are not exact.
CAUTION = 0.94


class RoomRules(Protocol):
    """What of a policy's configuration counts here."""

    @property
    def pass_share(self) -> float:
        """Longest pass with prefill, as a share of the tightest first-token objective."""
        ...


@dataclass(frozen=True, slots=True)
class MeanPace:
    """What counts where gaps between tokens are to hold in the mean."""

    left_s: float = math.inf
    """Until the first of the next tokens is due; infinity if nobody has an objective."""
    gained_s: float = 0.0
    """What each decode that nothing delays adds to that, at most."""

    @classmethod
    def of(cls, state: SchedulerState, decode_s: float) -> MeanPace:
        """Of everyone who runs, a decode of whom takes `decode_s`. O(running)."""
        left_s = least_token_slack_s(state.running, state.now_s, state.turns.decoded_s, CAUTION)
        if math.isinf(left_s):
            return cls()
        objectives = {request.slo.tbt_s for request in state.running}
        tightest_s = min(tbt_s for tbt_s in objectives if tbt_s is not None)
        return cls(left_s, CAUTION * tightest_s - decode_s)


@dataclass(frozen=True, slots=True)
class Decodes:
    """Those who decode beside a prefill, or right after it."""

    batch: Packing
    seconds: float
    """Of their decode alone."""
    left_s: float
    """Until the first of their next tokens is due, as the prefill is to see it."""
    mean: Callable[[], MeanPace] | None = None
    """By which prefill waits for decodes that gain it room; None: it never does."""


def room_before(
    state: SchedulerState, ahead: PromptsAhead, decodes: Decodes, rules: RoomRules
) -> tuple[PrefillRoom, Piece | None]:
    """What there is time for before `decodes`, who then decode without it.

    Returns what will be computed, too, as far as it is known; None: nothing is.
    """
    needed_s, turns = decodes.seconds, state.turns
    worth = ahead.worth_a_pass(WORTH_SHARE, MIN_CHUNK_TOKENS)
    wanted_s = wanted_pass_s(state, rules, needed_s)
    seconds = decodes.left_s - needed_s
    if seconds > wanted_s:
        uncut = ahead.worth_a_pass(CUTTING_SHARE, MIN_CHUNK_TOKENS)
        seconds = min(seconds, max(wanted_s, uncut.seconds))
    if _saves_up(turns, worth.seconds, decodes):
        fits = ahead.within(seconds)
        if fits is None or fits.tokens < ahead.first.tokens:
            return PrefillRoom(0), None
        return _granted(ahead, fits)
    has_turn = turns.decoded_last or not len(decodes.batch)
    if has_turn:
        # It is no longer than a pass may be: two decodes.
        seconds = max(seconds, needed_s / 2.0)
    fits = ahead.within(seconds)
    if fits is not None and fits.tokens >= min(worth.tokens, MIN_CHUNK_TOKENS):
        return _granted(ahead, fits)
    if not has_turn:
        return PrefillRoom(0), None
    least = ahead.worth_a_pass(PATIENT_SHARE)
    if fits is not None and fits.tokens > least.tokens:
        least = fits
    if least.tokens < worth.tokens and is_queue_late(state, least.chunks, needed_s, HURRY_SHARE):
        least = worth
    return _granted(ahead, least)


def _granted(ahead: PromptsAhead, piece: Piece) -> tuple[PrefillRoom, Piece]:
    if piece.tokens == ahead.whole.tokens:
        return NO_LIMIT, piece
    return PrefillRoom(ahead.in_pages(piece), piece.n_admitted), piece


def _saves_up(turns: PrefillTurns, worth_s: float, decodes: Decodes) -> bool:
    """Whether a few decodes, each sooner than its tokens are due, gain room for `worth_s`.

    Predictions are not exact: in the end prefill has its turn whatever was gained.
    """
    room_s = decodes.left_s - decodes.seconds
    if decodes.mean is None or worth_s <= room_s or turns.in_a_row >= DECODES_AHEAD:
        return False
    mean = decodes.mean()
    wanted_s = worth_s - (mean.left_s - decodes.seconds)
    return 0 < wanted_s <= DECODES_AHEAD * mean.gained_s


def tokens_within(ahead: PromptsAhead, seconds: float) -> int:
    """Of a pass of at most `seconds`, or of the first prompt if that takes longer; never less than
    what is worth a pass.
    """
    fits = ahead.within(max(seconds, ahead.first.seconds)) or ahead.first
    return max(ahead.in_pages(fits), ahead.worth_a_pass(WORTH_SHARE, MIN_CHUNK_TOKENS).tokens)


# -- beside decodes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoomBeside:
    """What there is time for in the pass in which `decodes` go on."""

    state: SchedulerState
    decodes: Decodes
    seconds: float
    """Longest that the pass may take; infinity if nothing limits it."""
    floor: int
    """Fewer tokens are not worth it, however long they take."""

    @cached_property
    def least_tokens(self) -> int:
        """Prefill tokens that are computed whatever the time."""
        return least_piece(self.state, begun_tokens(self.state), WORTH_SHARE, self.floor)[0]

    def tokens(self, cached: int, seconds: float = math.inf) -> int:
        """Of a pass of at most `seconds`, those counted who decode. cached: before the chunk."""
        tokens = self._largest(cached, min(seconds, self.seconds))
        if tokens < MIN_CHUNK_TOKENS:
            tokens = self.least_tokens
        return tokens + len(self.decodes.batch) if tokens else 0

    def pass_s(self, tokens: int, cached: int) -> float:
        """Seconds of the pass with `tokens` of prefill."""
        if tokens <= 0:
            return 0.0
        batch = self.decodes.batch
        return self.state.costs.iteration_s(((tokens, cached),), batch.tokens_read, len(batch))

    def _largest(self, cached: int, seconds: float) -> int:
        high = max(self.state.chunk_tokens, MIN_CHUNK_TOKENS)
        if math.isinf(seconds):
            return high
        high_s = self.pass_s(high, cached)
        if high_s <= seconds:
            return high
        return STEP_TOKENS * most_within(
            lambda n_steps: self.pass_s(n_steps * STEP_TOKENS, cached),
            seconds,
            -(-high // STEP_TOKENS),
            self.decodes.seconds,
            high_s,
        )


def room_beside(
    state: SchedulerState, decodes: Decodes, rules: RoomRules, floor: int = MIN_CHUNK_TOKENS
) -> RoomBeside:
    """Priced as one prompt: what is read of several is little against the decodes."""
    cached = begun_tokens(state)
    seconds, wanted_s = decodes.left_s, wanted_pass_s(state, rules, decodes.seconds)
    if seconds > wanted_s:
        seconds = min(seconds, max(wanted_s, least_piece(state, cached, CUTTING_SHARE)[1]))
    return RoomBeside(state, decodes, seconds, floor)


# -- both -----------------------------------------------------------------------------------------


def begun_tokens(state: SchedulerState) -> int:
    """What is there of the prompt that was begun."""
    return 0 if state.unfinished is None else state.unfinished.prefilled_tokens


def wanted_pass_s(state: SchedulerState, rules: RoomRules, decode_s: float) -> float:
    """Longest pass for the sake of who may arrive meanwhile and wait for its end.

    But prompts are not cut into pieces that take noticeably longer than the whole for that alone.
    decode_s: of the decode that comes in between.
    """
    return max(rules.pass_share * state.least_ttft_s, 2.0 * decode_s)


def least_piece(
    state: SchedulerState, cached: int, share: float, floor: int = MIN_CHUNK_TOKENS
) -> tuple[int, float]:
    """The least tokens in pieces of which the longest chunk takes at most `share` longer.

    cached: tokens of the prompt that are there. floor: no fewer. Returns seconds of such a piece,
    too.
    """
    most = max(state.chunk_tokens, floor)

    def piece_s(tokens: int) -> float:
        """Of the piece in the middle, which attends to as much as the average one."""
        return state.costs.iteration_s(((tokens, cached + (most - tokens) // 2),), 0, 0)

    tokens, whole_s = floor, piece_s(most)
    while tokens < most:
        seconds = piece_s(tokens)
        if seconds * -(-most // tokens) <= (1.0 + share) * whole_s:
            return tokens, seconds
        tokens *= 2
    return most, whole_s
