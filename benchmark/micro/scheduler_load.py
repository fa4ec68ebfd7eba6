"""For benchmark/micro/scheduler.py: requests that wait, and how plans for them are timed."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable
from dataclasses import replace

from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.request import QueuedRequest

PAGE_SIZE = 64
PROMPT_TOKENS = 2000
N_DOCUMENTS = 40
SPAN_S = 30.0
N_PROGRAMS, N_TENANTS = 1_000, 100
SLOS = (Slo("interactive", 0.5, 0.05), Slo("standard", 2.0, 0.1), Slo("batch", 30.0, None))


class Traffic:
    """The same requests, one after the other, for whoever has the same seed."""

    def __init__(self) -> None:
        self.random = random.Random(1)
        self.forest = Forest(PAGE_SIZE, tiers=(Tier.DEVICE, Tier.HOST, Tier.DISK))
        self.root = self.forest.root(namespace_hash("scheduler"))
        self.documents = [self.tokens(PROMPT_TOKENS // 2) for _ in range(N_DOCUMENTS)]
        self.cached_documents = self.documents[: N_DOCUMENTS // 3]
        self.now_s = 0.0
        self.n_arrived = 0

    def tokens(self, n: int) -> array[int]:
        return array("q", (self.random.randrange(100_000) for _ in range(n)))

    def request(self) -> QueuedRequest:
        """The next one, arriving now."""
        index = self.n_arrived
        self.n_arrived += 1
        begin = self.documents[index % N_DOCUMENTS] if index % 4 else self.tokens(1000)
        own = array("q", range(10**6 * (index + 1), 10**6 * (index + 1) + 1000))
        share = self.random.random()
        slo = SLOS[0 if share < 0.6 else 1 if share < 0.9 else 2]
        program = index % N_PROGRAMS
        return QueuedRequest(
            request_id=index,
            arrival_s=self.now_s,
            root=self.root,
            tokens=begin + own,
            prompt_tokens=PROMPT_TOKENS,
            max_new_tokens=512,
            slo=slo if program % 3 else replace(slo, task_s=4 * SPAN_S),
            tenant=str(program % N_TENANTS),
            program=str(program),
            queued_s=self.now_s,
        )

    @property
    def processed_tokens(self) -> int:
        """Of prompts, prefilled so far: what some orders count time by."""
        return self.n_arrived * 1000


def timed(call: Callable[[], object]) -> float:
    """Microseconds of this thread's processor time."""
    started = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - started) / 1e3
