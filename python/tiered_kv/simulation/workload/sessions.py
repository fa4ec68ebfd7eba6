"""Conversations and agents: calls that wait for the answer to the call before."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from tiered_kv.simulation.workload.block_ids import blocks_spanned, own_blocks
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request

_NO_BLOCKS: array[int] = array("q")


@dataclass(frozen=True, slots=True)
class Call:
    """A request of a session that has not been sent yet; fields as in `Request`."""

    blocks: array[int]
    input_tokens: int
    output_tokens: int
    pause_s: float = 0.0
    """Seconds between the previous call's finish and this one."""
    output_blocks: array[int] = field(default_factory=lambda: array("q"))
    next_use_hint_s: float | None = None
    ending: str = ""


class Session(Protocol):
    """A fixed script of calls."""

    def __len__(self) -> int:
        """Number of calls, at least 1."""
        ...

    def call(self, turn: int) -> Call:
        """Call number `turn`, from 0."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn adds to a conversation."""

    added_tokens: int
    """Tokens of the user's message or the tool's result."""
    output_tokens: int
    pause_s: float = 0.0
    """Seconds of thinking or of the tool's run before the turn."""
    expected_pause_s: float | None = None
    """What one would have guessed that pause to be."""


class Conversation:
    """A session whose prompt only grows: what was said, each answer, each addition.

    The prompt starts with `shared` blocks (a system prompt, tools, documents), which are whole;
    everything after them is the session's own, numbered `session`.
    """

    def __init__(
        self, session: int, block_tokens: int, shared: array[int], turns: Sequence[Turn]
    ) -> None:
        """Raises WorkloadError if there are no turns or one has no output."""
        if not turns or any(turn.output_tokens < 1 or turn.added_tokens < 0 for turn in turns):
            raise WorkloadError(
                "A conversation needs at least one turn, and each turn an output of at least one "
                "token; check the generator's lengths."
            )
        self._session = session
        self._block_tokens = block_tokens
        self._shared = shared
        self._turns = turns
        grown = list(accumulate(turn.added_tokens + turn.output_tokens for turn in turns))
        start = len(shared) * block_tokens
        # At least one token, or there would be nothing to ask.
        self._inputs = [
            max(1, start + end - turn.output_tokens) for end, turn in zip(grown, turns, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._turns)

    def call(self, turn: int) -> Call:
        """The prompt so far, this turn's addition at its end."""
        this = self._turns[turn]
        n_tokens = self._inputs[turn]
        is_last = turn + 1 == len(self._turns)
        return Call(
            self._shared + self._own(len(self._shared), self._spanned(n_tokens)),
            n_tokens,
            this.output_tokens,
            this.pause_s,
            # After the last turn nobody asks again.
            _NO_BLOCKS if is_last else self._output(n_tokens, n_tokens + this.output_tokens),
            None if is_last else self._turns[turn + 1].expected_pause_s,
        )

    def _spanned(self, n_tokens: int) -> int:
        return blocks_spanned(n_tokens, self._block_tokens)

    def _output(self, begin: int, end: int) -> array[int]:
        return self._own(begin // self._block_tokens, end // self._block_tokens)

    def _own(self, first: int, end: int) -> array[int]:
        return own_blocks(self._session, first, end)


class SessionWorkload:
    """Sessions that start by themselves, or a fixed number of users who start one after another."""

    def __init__(
        self,
        name: str,
        block_tokens: int,
        sessions: Sequence[Session],
        starts_s: Sequence[float],
        *,
        users: int = 0,
        slo_classes: Sequence[str] | None = None,
    ) -> None:
        """`starts_s` has each session's start, ascending; `slo_classes` its class, else `standard`.

        With `users` > 0 only the first `users` sessions start by themselves; each later one starts
        when the session `users` places before it ends: a user's next conversation.
        """
        if len(sessions) != len(starts_s) or list(starts_s) != sorted(starts_s):
            raise WorkloadError(
                "Each session needs a start time, in ascending order; sort the sessions."
            )
        if users < 0:
            raise WorkloadError(f"The number of users must be at least 0, not {users}.")
        self.name = name
        self.block_tokens = block_tokens
        self.sessions = sessions
        self._starts_s = starts_s
        self._users = users
        self._slo_classes = slo_classes
        self._first_ids = list(accumulate((len(session) for session in sessions), initial=0))

    @property
    def n_requests(self) -> int:
        """Calls of all sessions together."""
        return self._first_ids[-1]

    def initial(self) -> Iterator[Request]:
        """The first call of each session that starts by itself."""
        n_open = min(self._users or len(self.sessions), len(self.sessions))
        for session in range(n_open):
            yield self._request(session, 0, self._starts_s[session])

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """The session's next call after its pause, or its user's next session."""
        session = bisect.bisect_right(self._first_ids, finished.request_id) - 1
        turn = finished.request_id - self._first_ids[session] + 1
        if turn < len(self.sessions[session]):
            return self._request(session, turn, finish_s)
        following = session + self._users
        if self._users and following < len(self.sessions):
            return self._request(following, 0, finish_s)
        return None

    def _request(self, session: int, turn: int, after_s: float) -> Request:
        call = self.sessions[session].call(turn)
        return Request(
            request_id=self._first_ids[session] + turn,
            arrival_s=after_s + call.pause_s,
            blocks=call.blocks,
            input_tokens=call.input_tokens,
            output_tokens=call.output_tokens,
            session=session if len(self.sessions[session]) > 1 else None,
            slo_class=self._slo_classes[session] if self._slo_classes else "standard",
            ttft_slo_s=None,
            tbt_slo_s=None,
            output_blocks=call.output_blocks,
            next_use_hint_s=call.next_use_hint_s,
            ending=call.ending,
        )
