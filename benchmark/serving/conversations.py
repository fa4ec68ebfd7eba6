"""The load of multiturn.py: conversations in rounds, and the client that times their answers.

Token ids are drawn at random, so a prompt's length is exact and no two conversations share more
than chance lets them. Every system gets the same ids in the same order.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import requests

from benchmark.serving.streams import pieces

#: Ordinary tokens of every vocabulary we use; the first thousand holds the special ones.
FIRST_TOKEN, LAST_TOKEN = 1000, 40000


@dataclass(frozen=True)
class Shape:
    """What the conversations look like, in tokens.

    first_tokens: of the first turn's prompt. turn_tokens: new user tokens of every later turn.
    answer_tokens: of every answer, which belongs to the next turn's prompt. remembers: later turns
    repeat what came before; without it every prompt is new (no reuse at all).
    """

    conversations: int
    turns: int
    first_tokens: int
    turn_tokens: int
    answer_tokens: int
    remembers: bool = True

    def prompt_tokens(self, turn: int) -> int:
        return self.first_tokens + turn * (self.turn_tokens + self.answer_tokens)

    @property
    def longest_tokens(self) -> int:
        return self.prompt_tokens(self.turns - 1) + self.answer_tokens

    @property
    def working_set_tokens(self) -> int:
        return self.conversations * self.longest_tokens

    @property
    def requests(self) -> int:
        return self.conversations * self.turns


@dataclass(frozen=True)
class Sample:
    """One answered request. Times in seconds; counts of the prompt's tokens, by the KV's tier."""

    turn: int
    prompt_tokens: int
    cached: int
    device: int
    host: int
    disk: int
    ttft_s: float
    e2e_s: float
    output_ids: tuple[int, ...] = field(repr=False)


@dataclass
class Conversation:
    shape: Shape
    rng: random.Random
    history: list[int] = field(default_factory=list)
    turn: int = 0

    def next_prompt(self) -> list[int]:
        shape = self.shape
        if not shape.remembers:
            self.history = []
            return self._draw(shape.prompt_tokens(self.turn))
        self.history += self._draw(shape.turn_tokens if self.turn else shape.first_tokens)
        return self.history

    def _draw(self, n: int) -> list[int]:
        return [self.rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(n)]

    def ask(self, url: str, session: requests.Session) -> Sample:
        sample = stream(url, session, self.next_prompt(), self.shape.answer_tokens, self.turn)
        # What the next turn repeats is drawn, not what was answered: in bf16 answers may differ
        # between systems, and their loads would with them.
        self.history += self._draw(self.shape.answer_tokens)
        self.turn += 1
        return sample


def stream(
    url: str, session: requests.Session, prompt: list[int], new_tokens: int, turn: int = 0
) -> Sample:
    """One streamed request to /generate. Raises requests.RequestException or RuntimeError."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    began = time.perf_counter()
    times, answers = zip(*pieces(url, body, session), strict=True)
    ended_s, first_s, answer = time.perf_counter() - began, times[0] - began, answers[-1]
    meta = answer["meta_info"]
    details = meta.get("cached_tokens_details") or {}
    cached = int(meta["cached_tokens"])
    host, disk = int(details.get("host") or 0), int(details.get("storage") or 0)
    output_ids = tuple(answer.get("output_ids") or ())
    counts = (int(meta["prompt_tokens"]), cached, cached - host - disk, host, disk)
    return Sample(turn, *counts, first_s, ended_s, output_ids)


#: One request of a load: the conversation's number, and the seconds to pause before it.
Ask = tuple[int, float]


@dataclass(frozen=True)
class Load:
    """concurrency: requests in flight at most. gap_s: mean pause before a request (exponential)."""

    shape: Shape
    concurrency: int
    gap_s: float
    seed: int

    def blocks(self, size: int) -> list[list[Ask]]:
        """Every conversation's turns, round by round, in runs of at most `size` requests.

        Within a round the order is shuffled. No block has requests of two rounds, so the next turn
        of a conversation never overtakes the one before it.
        """
        rng = random.Random(self.seed)
        blocks = []
        for _ in range(self.shape.turns):
            order = rng.sample(range(self.shape.conversations), self.shape.conversations)
            asks = [(n, rng.expovariate(1 / self.gap_s) if self.gap_s else 0.0) for n in order]
            blocks += [asks[i : i + size] for i in range(0, len(asks), size)]
        return blocks


class Client:
    """All conversations of a load with one server. `with Client(load, url) as client:`"""

    def __init__(self, load: Load, url: str) -> None:
        self._url = url
        self._conversations = [
            Conversation(load.shape, random.Random(f"{load.seed}/{number}"))
            for number in range(load.shape.conversations)
        ]
        self._pool = ThreadPoolExecutor(load.concurrency)
        self._local = threading.local()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def ask(self, block: Iterable[Ask]) -> tuple[list[Sample], float]:
        """Asks them, waits for all answers; these in the order of `block`, and the seconds."""
        began = time.perf_counter()
        samples = list(self._pool.map(self._one, block))
        return samples, time.perf_counter() - began

    def _one(self, ask: Ask) -> Sample:
        number, pause_s = ask
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        time.sleep(pause_s)
        return self._conversations[number].ask(self._url, self._local.session)
