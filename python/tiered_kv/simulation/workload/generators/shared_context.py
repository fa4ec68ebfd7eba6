"""Long contexts used several times, in SCBench's two modes (arXiv 2412.10319).

multi-turn: one session asks its context's questions one after another, with the answers so far in
the prompt. multi-request: the questions are independent requests on the bare context.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.simulation.workload.arrivals import parse_arrivals
from tiered_kv.simulation.workload.block_ids import shared_blocks
from tiered_kv.simulation.workload.generators.draw import (
    LogNormal,
    generator,
    require,
    require_positive,
)
from tiered_kv.simulation.workload.sessions import Conversation, SessionWorkload, Turn

_MODES = ("multi-turn", "multi-request")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedContext:
    """Several questions about each of several long contexts."""

    mode: str = "multi-turn"
    """multi-turn or multi-request."""
    contexts: int = 50
    """Contexts, all different."""
    arrivals: str = "poisson:0.2"
    """When a context is first asked about."""
    questions: int = 5
    """Questions per context."""
    context_tokens: float = 64000.0
    """Median tokens of a context (log-normal, sigma 0.5), rounded up to whole blocks."""
    question_tokens: float = 60.0
    """Median tokens of a question (log-normal, sigma 0.5)."""
    output_tokens: float = 100.0
    """Median tokens of an answer (log-normal, sigma 0.7)."""
    pause_s: float = 20.0
    """Median seconds between questions on one context (log-normal, sigma 1)."""
    block_tokens: int = 64
    """Tokens per block."""

    def build(self, seed: int) -> SessionWorkload:
        """The workload for `seed`. Raises WorkloadError."""
        require(
            self.mode in _MODES,
            f"There is no mode {self.mode!r}; the known ones are {', '.join(_MODES)}.",
        )
        require_positive(
            self, "contexts", "questions", "context_tokens", "question_tokens", "output_tokens",
            "block_tokens",
        )  # fmt: skip
        first_s = parse_arrivals(self.arrivals).times(self.contexts, generator(seed, 0, 1))
        timed: list[tuple[float, Conversation]] = []
        for context in range(self.contexts):
            rng = generator(seed, context, 2)
            n_tokens = LogNormal(self.context_tokens, 0.5).tokens(rng)
            shared = shared_blocks(context, -(-n_tokens // self.block_tokens))
            turns = [
                Turn(
                    LogNormal(self.question_tokens, 0.5).tokens(rng),
                    LogNormal(self.output_tokens, 0.7).tokens(rng),
                    LogNormal(self.pause_s, 1.0).draw(rng) if index else 0.0,
                    self.pause_s,
                )
                for index in range(self.questions)
            ]
            start_s = float(first_s[context])
            if self.mode == "multi-turn":
                timed.append((start_s, Conversation(context, self.block_tokens, shared, turns)))
                continue
            for index, turn in enumerate(turns):
                start_s += turn.pause_s
                alone = [Turn(turn.added_tokens, turn.output_tokens)]
                session = context * self.questions + index
                timed.append((start_s, Conversation(session, self.block_tokens, shared, alone)))
        timed.sort(key=lambda pair: pair[0])
        return SessionWorkload(
            f"shared_context_{self.mode}",
            self.block_tokens,
            [conversation for _, conversation in timed],
            [start_s for start_s, _ in timed],
        )
