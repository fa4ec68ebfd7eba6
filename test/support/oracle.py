"""What plain SGLang answers: the truth that every tiered answer is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from harness.client import generate, in_parallel
from harness.server import Server

Prompt = tuple[int, ...]


class Oracle:
    """Greedy answers of a plain float32 server, each asked for once per session."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._known: dict[tuple[Prompt, int], tuple[int, ...]] = {}

    def output_ids(self, prompt: Prompt, max_new_tokens: int = 8) -> tuple[int, ...]:
        return self.all_output_ids([(prompt, max_new_tokens)])[0]

    def all_output_ids(
        self, asked: Sequence[tuple[Prompt, int]], concurrency: int = 8
    ) -> list[tuple[int, ...]]:
        """The outputs for (prompt, number of new tokens), in that order."""
        unknown = [key for key in dict.fromkeys(asked) if key not in self._known]
        answers = in_parallel(lambda key: generate(self.server, *key), unknown, concurrency)
        for key, answer in zip(unknown, answers, strict=True):
            self._known[key] = answer.output_ids
        return [self._known[key] for key in asked]
