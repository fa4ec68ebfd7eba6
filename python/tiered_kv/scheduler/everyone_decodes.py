"""What room there is for prefill if everyone who runs decodes, as a request policy counts on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.plan import NO_LIMIT, PrefillRoom
from tiered_kv.scheduler.prefill_room import (
    CAUTION,
    WORTH_SHARE,
    Decodes,
    MeanPace,
    RoomBeside,
    begun_tokens,
    least_piece,
    room_before,
    room_beside,
    tokens_within,
)
from tiered_kv.scheduler.prompts_ahead import PromptsAhead
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.slack import least_token_slack_s


class EveryoneRules(Protocol):
    """What of the policy's configuration counts here."""

    @property
    def slack(self) -> bool: ...
    @property
    def mix_decodes(self) -> bool: ...
    @property
    def pass_share(self) -> float: ...


class EveryoneDecodes:
    """For one plan. O(running)."""

    def __init__(self, state: SchedulerState, rules: EveryoneRules) -> None:
        self._state, self._rules = state, rules
        costs, n = state.costs, len(state.running)
        self.is_mixed = rules.mix_decodes and state.can_mix and self._mixing_pays()
        """Whether those who run decode beside the prefill."""
        # Beside a prefill nothing is read once for several.
        saved_tokens = 0 if self.is_mixed else state.shared_tokens_saved
        batch = Packing.of_all(costs, n, state.decode_context_tokens, saved_tokens)
        decode_s = batch.seconds
        left_s, mean = math.inf, None
        if rules.slack and self.is_mixed:
            # In a mixed pass they get their tokens, if late; else they might wait for many.
            possible_s = costs.iteration_s((), 0, 1)
            decoded_s = state.turns.decoded_s
            left_s = least_token_slack_s(state.running, state.now_s, decoded_s, CAUTION, possible_s)
        elif rules.slack:
            pace = MeanPace.of(state, decode_s)
            left_s, mean = pace.left_s, lambda: pace
        self._decodes = Decodes(batch, decode_s, left_s, mean)
        self._beside: RoomBeside | None = None
        if self.is_mixed and rules.slack:
            self._beside = room_beside(state, self._decodes, rules)
        self.slowdown = self._slowdown(self._beside)
        """Seconds per second of prefill work, in passes as long as there is time for."""

    def _mixing_pays(self) -> bool:
        """Whether it is wanted, and nothing that was measured speaks against it."""
        state, costs = self._state, self._state.costs
        is_wanted = state.wants_mixing
        if not (costs.device.mixes_decodes if is_wanted is None else is_wanted):
            return False
        chunk = ((max(state.chunk_tokens, 1), begun_tokens(state)),)
        gain_s = costs.mixing_gain_s(
            chunk, state.decode_context_tokens, len(state.running), state.shared_tokens_saved
        )
        return gain_s >= 0.0

    def ahead(self, first: Sequence[QueuedRequest], *, goes_on: bool) -> PromptsAhead | None:
        """What a prefill that runs alone could compute; None if there is nothing, or it is mixed.

        first: who would be admitted, in order. goes_on: whether the prompt that was begun does,
        before all of them.
        """
        if self.is_mixed or not (first or goes_on):
            return None
        return PromptsAhead(self._state, first, goes_on=goes_on)

    def room(
        self,
        first: Sequence[QueuedRequest],
        ahead: PromptsAhead | None,
        due_s: float,
        *,
        goes_on: bool,
    ) -> tuple[PrefillRoom, int | None]:
        """Returns the most tokens for the sake of who is first, too; None: any number.

        ahead: of the same. due_s: in how many seconds the first token of the first of `first` is
        due; nobody joins it if that would make it late.
        """
        if not self._rules.slack or not (first or goes_on):
            return NO_LIMIT, None
        if ahead is None:
            return self._room_beside(first, due_s, goes_on=goes_on)
        room, _ = room_before(self._state, ahead, self._decodes, self._rules)
        is_hurried = not goes_on and ahead.first.seconds <= due_s < ahead.whole.seconds
        return room, tokens_within(ahead, due_s) if is_hurried else None

    def _room_beside(
        self, first: Sequence[QueuedRequest], due_s: float, *, goes_on: bool
    ) -> tuple[PrefillRoom, int | None]:
        state, beside = self._state, self._beside
        assert beside is not None
        if goes_on:
            return PrefillRoom(beside.tokens(begun_tokens(state))), None
        cached, new = first[0].cached_tokens, first[0].uncached_tokens
        room = PrefillRoom(beside.tokens(cached))
        is_hurried = new < state.chunk_tokens and beside.pass_s(new, cached) <= due_s < math.inf
        return room, beside.tokens(cached, due_s) if is_hurried else None

    def _slowdown(self, beside: RoomBeside | None) -> float:
        """Before it is known who is first: as if it was one prompt."""
        state, costs, decodes = self._state, self._state.costs, self._decodes
        if beside is not None:
            tokens = beside.tokens(0)
            return max(1.0, beside.pass_s(tokens, 0) / costs.marginal_prefill_s(tokens))
        least, least_s = least_piece(state, begun_tokens(state), WORTH_SHARE)
        most = max(state.chunk_tokens, least)
        fixed_s = max(0.0, least_s - costs.marginal_prefill_s(least, begun_tokens(state)))
        whole_s = fixed_s + costs.marginal_prefill_s(most, begun_tokens(state))
        seconds = max(decodes.left_s - decodes.seconds, decodes.seconds / 2.0, least_s)
        seconds = min(seconds, whole_s)
        return seconds / (seconds - fixed_s) if seconds > fixed_s else 1.0
