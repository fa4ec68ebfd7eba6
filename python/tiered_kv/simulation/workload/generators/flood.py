"""Adversarial work for schedulers that favour cached prefixes: a hot prefix floods the queue."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Flood:
    """Requests on hot prefixes without end, and now and then one that shares nothing.

    Longest-prefix-match order serves the hot ones first for as long as any waits, so the cold ones
    starve (sglang#31954). They are told apart by their service classes, `hot` and `cold`.
    """

    duration_s: float = 300.0
    """Length of the flood."""
    hot: str = "poisson:20"
    """Arrivals of requests on the hot prefixes; too fast for the server, or nothing starves."""
    cold: str = "poisson:0.5"
    """Arrivals of the others."""
    prefixes: int = 2
    """Hot prefixes; the flood changes from one to the next in equal parts of the time."""
    prefix_tokens: int = 8192
    """Tokens of a hot prefix, rounded up to whole blocks."""
    question_tokens: float = 64.0
    """Median tokens after it (log-normal, sigma 0.5)."""
    cold_tokens: float = 8192.0
    """Median tokens of a cold prompt (log-normal, sigma 0.5)."""
    output_tokens: float = 64.0
    """Median tokens of an answer (log-normal, sigma 0.5)."""
    block_tokens: int = 64
    """Tokens per block."""

    def build(self, seed: int) -> SessionWorkload:
        """The workload for `seed`. Raises WorkloadError."""
        require_positive(
            self, "duration_s", "prefixes", "prefix_tokens", "question_tokens", "cold_tokens",
            "output_tokens", "block_tokens",
        )  # fmt: skip
        n_prefix = -(-self.prefix_tokens // self.block_tokens)
        answer = LogNormal(self.output_tokens, 0.5)
        timed: list[tuple[float, str, Conversation]] = []
        for kind, arrivals in enumerate((self.hot, self.cold)):
            added = LogNormal(self.cold_tokens if kind else self.question_tokens, 0.5)
            for index, start_s in enumerate(self._times(arrivals, seed, kind)):
                rng = generator(seed, index, kind)
                hot = min(self.prefixes - 1, int(start_s / self.duration_s * self.prefixes))
                shared = shared_blocks(hot, 0 if kind else n_prefix)
                turn = Turn(added.tokens(rng), answer.tokens(rng))
                session = 2 * index + kind
                conversation = Conversation(session, self.block_tokens, shared, [turn])
                timed.append((start_s, ("hot", "cold")[kind], conversation))
        timed.sort(key=lambda item: item[:2])
        return SessionWorkload(
            "flood",
            self.block_tokens,
            [conversation for _, _, conversation in timed],
            [start_s for start_s, _, _ in timed],
            slo_classes=[name for _, name, _ in timed],
        )

    def _times(self, arrivals: str, seed: int, kind: int) -> list[float]:
        """Arrivals before the flood's end."""
        process = parse_arrivals(arrivals)
        require(math.isfinite(process.rate), "A flood needs a rate; write for example poisson:20.")
        expected = self.duration_s * process.rate
        rng = generator(seed, kind, 3)
        times: list[float] = []
        while not times or times[-1] < self.duration_s:
            offset_s = times[-1] if times else 0.0
            more = process.times(math.ceil(expected) + 8, rng) + (offset_s if times else 0.0)
            times.extend(more.tolist())
        return [time for time in times if time < self.duration_s]
