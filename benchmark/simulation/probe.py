"""Times single forward passes of an SGLang server from outside, by what its clients see.

A pass is timed from one token to the next, never from the sending of a request: so what HTTP and
detokenising add is in both ends and drops out. Prompts are token ids drawn at random.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmark.serving.streams import pieces

FIRST_TOKEN, LAST_TOKEN = 1000, 40000
#: Tokens of the request that keeps the server busy while those to be timed gather in its queue.
BLOCKER_TOKENS = 192
#: Seconds that they have for it; a blocker that ends sooner is followed by a longer one.
GATHER_S = 0.15


@dataclass
class Answer:
    """One streamed answer: when it was sent and when each token came (time.perf_counter)."""

    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    by_tier: dict[str, int] = field(default_factory=dict)

    @property
    def first_s(self) -> float:
        return self.token_times_s[0]

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.sent_s


@dataclass(frozen=True)
class PrefillSample:
    """One pass that only prefills: (new, cached) tokens of each request, and seconds."""

    chunks: tuple[tuple[int, int], ...]
    seconds: float


@dataclass(frozen=True)
class DecodeSample:
    """One decode pass: requests, the sum of their contexts, and seconds."""

    n_requests: int
    context_tokens: int
    seconds: float


class Probe:
    """Asks the server at `url`; one probe at a time, and nobody else."""

    def __init__(self, url: str, seed: int = 0) -> None:
        self._url = url
        self._rng = random.Random(seed)

    def tokens(self, n: int) -> list[int]:
        """`n` new token ids."""
        return [self._rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(n)]

    def ask(self, prompt: Sequence[int], n_new: int = 1) -> Answer:
        """One answer of exactly `n_new` tokens. Raises as `pieces` does."""
        body = {
            "input_ids": list(prompt),
            "sampling_params": {"temperature": 0, "max_new_tokens": n_new, "ignore_eos": True},
            "stream": True,
        }
        answer = Answer(time.perf_counter())
        meta: dict[str, Any] = {}
        n_seen = 0
        for now_s, piece in pieces(self._url, body):
            meta = piece["meta_info"]
            # Two tokens in one piece came at the same time as far as a client can tell.
            answer.token_times_s += [now_s] * (meta["completion_tokens"] - n_seen)
            n_seen = meta["completion_tokens"]
        answer.cached_tokens = meta["cached_tokens"]
        answer.by_tier = meta.get("cached_tokens_details") or {}
        return answer

    def together(self, prompts: Sequence[Sequence[int]], n_new: int = 1) -> tuple[Answer, ...]:
        """Answers of requests that begin in one pass: the blocker's, then one for each prompt."""
        answers: list[Answer | None] = [None] * (len(prompts) + 1)

        def run(at: int, prompt: Sequence[int], n: int) -> None:
            answers[at] = self.ask(prompt, n)

        blocker = threading.Thread(target=run, args=(0, self.tokens(BLOCKER_TOKENS), 1))
        others = [
            threading.Thread(target=run, args=(at, prompt, n_new))
            for at, prompt in enumerate(prompts, 1)
        ]
        blocker.start()
        time.sleep(GATHER_S / 3)
        for other in others:
            other.start()
        for thread in (blocker, *others):
            thread.join()
        done = tuple(answer for answer in answers if answer is not None)
        if len(done) != len(answers):
            raise RuntimeError("the server did not answer a probe; see its log")
        return done

    def prefill(self, n_requests: int, new: int, prefix: Sequence[int]) -> PrefillSample | None:
        """One pass over `n_requests` prompts, each `new` tokens after `prefix`.

        None if they did not begin in one pass (the machine was busy).
        """
        blocker, *answers = self.together([[*prefix, *self.tokens(new)] for _ in range(n_requests)])
        firsts = [answer.first_s for answer in answers]
        if min(firsts) <= blocker.first_s or max(a.sent_s for a in answers) >= blocker.first_s:
            return None
        seconds = max(firsts) - blocker.first_s
        if max(firsts) - min(firsts) > 0.2 * seconds:
            return None
        chunks = tuple(
            (new + len(prefix) - answer.cached_tokens, answer.cached_tokens) for answer in answers
        )
        return PrefillSample(chunks, seconds)

    def decode(self, n_requests: int, prefix: Sequence[int], n_new: int) -> DecodeSample | None:
        """The median of the passes in which all of `n_requests` decode after `prefix`."""
        _, *answers = self.together([[*prefix, *self.tokens(8)] for _ in range(n_requests)], n_new)
        start_s = max(answer.first_s for answer in answers)
        end_s = min(answer.token_times_s[-1] for answer in answers)
        gaps, positions = [], []
        for answer in answers:
            times = answer.token_times_s
            inside = [
                i for i in range(1, len(times)) if start_s <= times[i - 1] and times[i] <= end_s
            ]
            gaps += [times[i] - times[i - 1] for i in inside]
            positions += inside
        if not gaps:
            return None
        context = len(prefix) + 8 + statistics.fmean(positions)
        return DecodeSample(n_requests, round(n_requests * context), statistics.median(gaps))
