"""People chatting: a few system prompts, turns, thinking between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiered_kv.simulation.workload.arrivals import parse_arrivals
from tiered_kv.simulation.workload.block_ids import shared_blocks
from tiered_kv.simulation.workload.generators.draw import (
    LogNormal,
    generator,
    require,
    require_positive,
    zipf_choice,
)
from tiered_kv.simulation.workload.sessions import Conversation, SessionWorkload, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Multi-turn conversations; each turn resends all that was said."""

    sessions: int = 500
    """Conversations."""
    arrivals: str = "poisson:1"
    """When conversations start."""
    users: int = 0
    """Over 0: so many people, each with one conversation after another; arrivals start them."""
    turns: float = 5.0
    """Mean turns of a conversation (geometric)."""
    system_prompts: int = 4
    """Different system prompts; the k-th is 1/k as popular as the first."""
    system_tokens: int = 1024
    """Tokens of a system prompt, rounded up to whole blocks."""
    message_tokens: float = 200.0
    """Median tokens of a message (log-normal, sigma 1)."""
    output_tokens: float = 250.0
    """Median tokens of an answer (log-normal, sigma 0.8)."""
    think_s: float = 30.0
    """Median seconds before the next message (log-normal, sigma 1)."""
    max_context_tokens: int = 32768
    """A conversation ends before its prompt and answer grow longer."""
    block_tokens: int = 64
    """Tokens per block."""

    def build(self, seed: int) -> SessionWorkload:
        """The workload for `seed`. Raises WorkloadError."""
        require_positive(
            self, "sessions", "turns", "system_prompts", "message_tokens", "output_tokens",
            "block_tokens", "max_context_tokens",
        )  # fmt: skip
        require(
            self.turns >= 1, f"A conversation has at least 1 turn, not {self.turns} on average."
        )
        n_system = -(-self.system_tokens // self.block_tokens)
        popularity = zipf_choice(self.system_prompts, 1.0)
        sessions = []
        for session in range(self.sessions):
            rng = generator(seed, session)
            shared = shared_blocks(int(rng.choice(self.system_prompts, p=popularity)), n_system)
            turns = self._turns(rng, len(shared) * self.block_tokens)
            sessions.append(Conversation(session, self.block_tokens, shared, turns))
        starts = parse_arrivals(self.arrivals).times(self.sessions, generator(seed, 0, 1))
        return SessionWorkload(
            "chat", self.block_tokens, sessions, starts.tolist(), users=self.users
        )

    def _turns(self, rng: np.random.Generator, n_context: int) -> list[Turn]:
        message = LogNormal(self.message_tokens, 1.0)
        answer = LogNormal(self.output_tokens, 0.8)
        think = LogNormal(self.think_s, 1.0)
        turns: list[Turn] = []
        for index in range(int(rng.geometric(1 / self.turns))):
            pause_s = think.draw(rng) if index else 0.0
            turn = Turn(message.tokens(rng), answer.tokens(rng), pause_s, self.think_s)
            n_context += turn.added_tokens + turn.output_tokens
            if turns and n_context > self.max_context_tokens:
                break
            turns.append(turn)
        return turns
