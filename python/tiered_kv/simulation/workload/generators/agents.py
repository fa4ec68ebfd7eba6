"""Agents that call tools: many short steps on a long, growing context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiered_kv.simulation.workload.arrivals import parse_arrivals
from tiered_kv.simulation.workload.block_ids import shared_blocks
from tiered_kv.simulation.workload.generators.draw import LogNormal, generator, require_positive
from tiered_kv.simulation.workload.sessions import Conversation, SessionWorkload, Turn

_TOOLS = ((0.55, 0.5, 2000.0), (0.30, 5.0, 1000.0), (0.10, 40.0, 3000.0), (0.05, 120.0, 300.0))
"""Share of calls, median seconds, median tokens of the result: file reads, searches and commands,
test runs, and questions to a person. Chosen to spread pauses as coding agents' do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agents:
    """Tool-using agents of a few kinds; agents of a kind share instructions and tools."""

    sessions: int = 200
    """Tasks."""
    arrivals: str = "poisson:0.2"
    """When tasks start."""
    users: int = 0
    """Over 0: so many agents, each with one task after another; arrivals start them."""
    kinds: int = 3
    """Kinds of agent, equally frequent."""
    system_tokens: int = 12000
    """Tokens of a kind's instructions and tools, rounded up to whole blocks."""
    steps: float = 20.0
    """Mean calls of a task (geometric)."""
    task_tokens: float = 500.0
    """Median tokens of the task itself (log-normal, sigma 1)."""
    output_tokens: float = 150.0
    """Median tokens of a step's output (log-normal, sigma 0.8)."""
    pause: float = 1.0
    """Factor on all tools' running times."""
    max_context_tokens: int = 131072
    """A task ends before its prompt and output grow longer."""
    block_tokens: int = 64
    """Tokens per block."""

    def build(self, seed: int) -> SessionWorkload:
        """The workload for `seed`. Raises WorkloadError."""
        require_positive(
            self, "sessions", "kinds", "steps", "task_tokens", "output_tokens", "block_tokens",
            "max_context_tokens",
        )  # fmt: skip
        n_system = -(-self.system_tokens // self.block_tokens)
        sessions = []
        for session in range(self.sessions):
            rng = generator(seed, session)
            shared = shared_blocks(int(rng.integers(self.kinds)), n_system)
            turns = self._turns(rng, len(shared) * self.block_tokens)
            sessions.append(Conversation(session, self.block_tokens, shared, turns))
        starts = parse_arrivals(self.arrivals).times(self.sessions, generator(seed, 0, 1))
        return SessionWorkload(
            "agents", self.block_tokens, sessions, starts.tolist(), users=self.users
        )

    def _turns(self, rng: np.random.Generator, n_context: int) -> list[Turn]:
        shares = [share for share, _, _ in _TOOLS]
        output = LogNormal(self.output_tokens, 0.8)
        turns = [Turn(LogNormal(self.task_tokens, 1.0).tokens(rng), output.tokens(rng))]
        n_context += turns[0].added_tokens + turns[0].output_tokens
        for _ in range(int(rng.geometric(1 / max(1.0, self.steps))) - 1):
            _, median_s, result_tokens = _TOOLS[int(rng.choice(len(_TOOLS), p=shares))]
            median_s *= self.pause
            turn = Turn(
                LogNormal(result_tokens, 1.0).tokens(rng),
                output.tokens(rng),
                LogNormal(median_s, 0.7).draw(rng),
                # The framework knows which tool runs, so about how long it takes.
                median_s,
            )
            n_context += turn.added_tokens + turn.output_tokens
            if n_context > self.max_context_tokens:
                break
            turns.append(turn)
        return turns
