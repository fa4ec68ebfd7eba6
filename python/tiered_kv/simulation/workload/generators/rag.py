"""Retrieval: questions over documents, some of which everybody asks about."""

from __future__ import annotations

from array import array
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
class Rag:
    """Single questions after a system prompt and a few retrieved documents.

    Prefix reuse needs the same documents in the same order: the first document is shared often,
    a set of several rarely.
    """

    requests: int = 1000
    """Questions."""
    arrivals: str = "poisson:2"
    """When they are asked."""
    documents: int = 100
    """Documents in the collection."""
    zipf: float = 1.0
    """Popularity: the k-th document is k ** -zipf as popular as the first."""
    retrieved: int = 2
    """Documents per question."""
    sorted: bool = False
    """Put a question's documents in one fixed order rather than in that of their rank."""
    document_tokens: float = 4000.0
    """Median tokens of a document (log-normal, sigma 0.6), rounded up to whole blocks."""
    system_tokens: int = 512
    """Tokens of the system prompt, rounded up to whole blocks."""
    question_tokens: float = 60.0
    """Median tokens of a question (log-normal, sigma 0.5)."""
    output_tokens: float = 200.0
    """Median tokens of an answer (log-normal, sigma 0.5)."""
    block_tokens: int = 64
    """Tokens per block."""

    def build(self, seed: int) -> SessionWorkload:
        """The workload for `seed`. Raises WorkloadError."""
        require_positive(
            self, "requests", "documents", "retrieved", "document_tokens", "question_tokens",
            "output_tokens", "block_tokens",
        )  # fmt: skip
        require(
            self.retrieved <= self.documents,
            f"{self.retrieved} documents can't be retrieved from {self.documents}; have more.",
        )
        lengths = generator(seed, 0, 1)
        document = LogNormal(self.document_tokens, 0.6)
        library = [
            shared_blocks(1 + index, -(-document.tokens(lengths) // self.block_tokens))
            for index in range(self.documents)
        ]
        system = shared_blocks(0, -(-self.system_tokens // self.block_tokens))
        popularity = zipf_choice(self.documents, self.zipf)
        sessions = []
        for request in range(self.requests):
            rng = generator(seed, request, 2)
            shared = system + self._retrieve(library, popularity, rng)
            question = LogNormal(self.question_tokens, 0.5).tokens(rng)
            answer = LogNormal(self.output_tokens, 0.5).tokens(rng)
            turns = [Turn(question, answer)]
            sessions.append(Conversation(request, self.block_tokens, shared, turns))
        starts = parse_arrivals(self.arrivals).times(self.requests, generator(seed, 0, 3))
        return SessionWorkload("rag", self.block_tokens, sessions, starts.tolist())

    def _retrieve(
        self, library: list[array[int]], popularity: np.ndarray, rng: np.random.Generator
    ) -> array[int]:
        chosen = rng.choice(len(library), self.retrieved, replace=False, p=popularity)
        found = sorted(chosen) if self.sorted else chosen
        blocks = array("q")
        for document in found:
            blocks += library[document]
        return blocks
