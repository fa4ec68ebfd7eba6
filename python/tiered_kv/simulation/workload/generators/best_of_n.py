"""Several answers to one prompt, wanted at once: sampling, voting, search."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.simulation.workload.arrivals import parse_arrivals
from tiered_kv.simulation.workload.block_ids import shared_blocks
from tiered_kv.simulation.workload.generators.draw import LogNormal, generator, require_positive
from tiered_kv.simulation.workload.sessions import Conversation, SessionWorkload, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """`samples` requests with the same prompt arrive together, `prompts` times.

    The prompt is whole blocks and one token more, since a server always computes the last one.
    """

    prompts: int = 200
    """Prompts, all different but for the examples in front."""
    samples: int = 8
    """Answers wanted to each."""
    arrivals: str = "poisson:0.5"
    """When prompts come."""
    examples_tokens: int = 2048
    """Tokens of the worked examples in front of all prompts, rounded up to whole blocks."""
    prompt_tokens: float = 400.0
    """Median tokens of a prompt (log-normal, sigma 0.7), rounded up to whole blocks."""
    output_tokens: float = 600.0
    """Median tokens of an answer (log-normal, sigma 0.7)."""
    block_tokens: int = 64
    """Tokens per block."""

    def build(self, seed: int) -> SessionWorkload:
        """The workload for `seed`. Raises WorkloadError."""
        require_positive(
            self, "prompts", "samples", "prompt_tokens", "output_tokens", "block_tokens"
        )
        examples = shared_blocks(0, -(-self.examples_tokens // self.block_tokens))
        sessions = []
        for prompt in range(self.prompts):
            rng = generator(seed, prompt)
            n_tokens = LogNormal(self.prompt_tokens, 0.7).tokens(rng)
            shared = examples + shared_blocks(1 + prompt, -(-n_tokens // self.block_tokens))
            for sample in range(self.samples):
                turn = Turn(1, LogNormal(self.output_tokens, 0.7).tokens(rng))
                session = prompt * self.samples + sample
                sessions.append(Conversation(session, self.block_tokens, shared, [turn]))
        times = parse_arrivals(self.arrivals).times(self.prompts, generator(seed, 0, 1))
        starts = [float(time) for time in times for _ in range(self.samples)]
        return SessionWorkload("best_of_n", self.block_tokens, sessions, starts)
