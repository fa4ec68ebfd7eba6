"""How long a snapshot (`/tiered_kv/snapshot`) keeps the scheduler's thread busy, and what it adds.

A forest of N nodes: 40 documents, each with conversations of ten turns below it, a node of one to
eight pages a turn, a tenth of them also on disk. W requests wait under the named policy, 128 run
and 16 are being prefilled. A snapshot comes in two parts, `forest` and `requests`, each asked for
by itself, between other passes: what `plugin/snapshots/collect.py` does for it, and its encoding
for the way to the HTTP server's process. Before each of them a request comes, one goes, a prompt is
inserted and the policy plans.

Times are microseconds of the thread's processor time, less what reading that clock takes: median,
99th percentile, longest. The budget, checked by --check, is 1,000 us at the 99th percentile of each
part with 100,000 nodes and 10,000 waiting. `rows` are the mean numbers of prefixes or requests: an
allowance of processor time ends a part early. `insert` is what recording a conversation's next turn
in the forest costs with and without the index of the largest prefixes, median.

Examples:
  python benchmark/micro/snapshot.py --check                   the table, and status 1 if over
  python benchmark/micro/snapshot.py --out benchmark/results   with a result file
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from tiered_kv.api.slo import Slo
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.memory.demand import Expectation
from tiered_kv.plugin.cache.watched import Watched
from tiered_kv.plugin.snapshots.collect import Part
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost
from tiered_kv.scheduler.lifecycle import RequestLives
from tiered_kv.scheduler.plan import PLAN_LIMIT
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState, request_policies
from tiered_kv.scheduler.waiting import WaitingQueue

PAGE_SIZE = 64
N_DOCUMENTS = 40
TURNS = 10
DOCUMENT_PAGES = 32
N_RUNNING, N_PREFILLING = 128, 16
SPAN_S = 30.0
BUDGET_US = 1_000.0
CHECKED = ("slack", 100_000, 10_000)
CASES = (
    ("slack", 1_000, 100),
    ("slack", 100_000, 1_000),
    CHECKED,
    ("fcfs", 100_000, 10_000),
    ("edf", 100_000, 10_000),
)
SLOS = (Slo("interactive", 0.5, 0.05), Slo("standard", 2.0, 0.1), Slo("batch", 30.0, None))
ENCODE = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True)
class Row:
    """One case."""

    policy: str
    n_nodes: int
    n_waiting: int
    part: str
    rows: float
    median_us: float
    p99_us: float
    longest_us: float
    reply_bytes: int

    def cells(self) -> list[str]:
        times = (self.median_us, self.p99_us, self.longest_us)
        counts = (f"{self.n_nodes:,}", f"{self.n_waiting:,}", self.part, f"{self.rows:.0f}")
        return [self.policy, *counts, *(f"{t:,.0f}" for t in times), f"{self.reply_bytes:,}"]


class Conversations:
    """A forest that grows by turns."""

    def __init__(
        self, n_nodes: int, *, is_watched: bool = True, n_documents: int = N_DOCUMENTS
    ) -> None:
        self.random = random.Random(1)
        self.forest = Forest(PAGE_SIZE)
        self.watched = Watched(self.forest) if is_watched else None
        self.root = self.forest.root(namespace_hash("snapshot"))
        self.last: list[Node] = []
        self.prompts: list[array[int]] = []
        self.n_tokens = 0
        documents = [self.fresh(DOCUMENT_PAGES) for _ in range(n_documents)]
        for document in documents:
            self.insert(document)
        while len(self.forest) < n_nodes:
            prompt = array("q", self.random.choice(documents))
            turns = range(min(TURNS, n_nodes - len(self.forest)))
            for _ in turns:
                prompt = prompt + self.fresh(self.random.randint(1, 8))
                self.last.append(self.insert(prompt))
            self.prompts.append(prompt)
        for node in self.forest.nodes()[::10]:
            self.forest.set_resident(node, Tier.DISK)

    def fresh(self, n_pages: int) -> array[int]:
        """Tokens that nothing has yet."""
        begin = self.n_tokens
        self.n_tokens += n_pages * PAGE_SIZE
        return array("q", range(begin, self.n_tokens))

    def insert(self, prompt: array[int]) -> Node:
        return self.forest.insert(self.root, prompt, range(len(prompt) // PAGE_SIZE)).last

    def turn(self) -> float:
        """Another turn of some conversation; returns the microseconds that recording it took."""
        at = self.random.randrange(len(self.prompts))
        prompt = self.prompts[at] = self.prompts[at] + self.fresh(2)
        return timed(lambda: self.insert(prompt))


@dataclass(eq=False, slots=True)
class Req:
    """What is read of SGLang's requests."""

    rid: str
    tiered_kv_queued: QueuedRequest
    output_ids: range
    last_node: Node
    cached_tokens: int = 1024

    def finished(self) -> bool:
        return False


class Scheduler:
    """What `Part` reads of SGLang's, over a real forest, queue and policy."""

    def __init__(
        self, policy: str, n_nodes: int, n_waiting: int, n_documents: int = N_DOCUMENTS
    ) -> None:
        self.talk = Conversations(n_nodes, n_documents=n_documents)
        self.costs = cost_model()
        self.policy = request_policies.get(policy)()
        self.lives = RequestLives(WaitingQueue(self.talk.forest), self.policy)
        self.reqs: dict[int, Req] = {}
        self.n_arrived = 0
        now_s = time.perf_counter()
        for index in range(n_waiting):
            self.arrive(now_s - SPAN_S * (1 - index / n_waiting))
        self.plan()
        running = [self.req(now_s, n_output=40) for _ in range(N_RUNNING)]
        self.scheduler = SimpleNamespace(
            tiered_kv_order=self.order(),
            server_args=SimpleNamespace(tiered_kv_view_text_tokens=0, tiered_kv_policy=policy),
            running_batch=SimpleNamespace(reqs=running),
            last_batch=SimpleNamespace(
                reqs=[self.req(now_s) for _ in range(N_PREFILLING)],
                forward_mode=SimpleNamespace(is_extend=lambda: True),
            ),
            chunked_req=None,
            waiting_queue=list(self.reqs.values()),
        )
        self.cache = cache_of(self.talk)

    def order(self) -> Any:
        queue = SimpleNamespace(
            waiting=self.lives.waiting, held={}, lives=self.lives, req=self.reqs.__getitem__
        )
        told = {node.node_id: Expectation(1.0) for node in self.talk.last[:64]}
        return SimpleNamespace(
            queue=queue,
            policy=self.policy,
            costs=self.costs,
            foretold=SimpleNamespace(told=told),
        )

    def req(self, arrival_s: float, *, n_output: int = 0) -> Req:
        """A request that goes on from some conversation."""
        index = self.n_arrived
        self.n_arrived += 1
        talk, chosen = self.talk, self.talk.random
        prompt = chosen.choice(talk.prompts) + talk.fresh(4)
        queued = QueuedRequest(
            request_id=index,
            arrival_s=arrival_s,
            root=talk.root,
            tokens=prompt,
            prompt_tokens=len(prompt),
            max_new_tokens=512,
            slo=chosen.choices(SLOS, (6, 3, 1))[0],
            tenant=f"tenant {index % 12}",
            first_token_s=arrival_s if n_output else None,
            output_tokens=n_output,
        )
        return Req(f"{index:032x}", queued, range(n_output), chosen.choice(talk.last))

    def arrive(self, now_s: float) -> None:
        req = self.req(now_s)
        self.reqs[req.tiered_kv_queued.request_id] = req
        self.lives.queue(req.tiered_kv_queued, now_s)

    def plan(self) -> None:
        state = SchedulerState(
            now_s=time.perf_counter(),
            waiting=self.lives.waiting,
            held={},
            running=[],
            decode_context_tokens=0,
            processed_prefill_tokens=0,
            chunk_tokens=8192,
            costs=self.costs,
            available_tokens=400_000,
        )
        self.policy.plan(state, PLAN_LIMIT)

    def step(self) -> None:
        """What happens between two snapshots."""
        now_s = time.perf_counter()
        self.arrive(now_s)
        first = next(iter(self.reqs))
        self.lives.abort(self.reqs.pop(first).tiered_kv_queued, now_s)
        self.talk.turn()
        self.plan()

    def part(self) -> Part:
        assert self.talk.watched is not None
        return Part(self.scheduler, self.cache, self.talk.watched)

    def snapshot(self) -> dict[str, Any]:
        """Both parts."""
        return {**self.part().forest(), **self.part().requests()}


def cost_model() -> CostModel:
    edge = EdgeCost(50e9, 1e-5)
    edges = {(Tier.HOST, Tier.DEVICE): edge, (Tier.DEVICE, Tier.HOST): edge}
    return CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), edges)


def cache_of(talk: Conversations) -> Any:
    """What `Part` reads of the cache; the tiers' numbers are plain attributes there, too."""
    queue = SimpleNamespace(pages_in_flight=3, in_flight=1)
    formats = SimpleNamespace(page_bytes=8 << 20, slot_bytes=8 << 20)
    disk = SimpleNamespace(
        capacity_bytes=1 << 40, stats=lambda: SimpleNamespace(pages=100_000, degraded=False)
    )
    context = SimpleNamespace(
        forest=talk.forest,
        page_size=PAGE_SIZE,
        host=SimpleNamespace(n_pages=1 << 20),
        moved_bytes={},
        page_format=lambda _: formats,
    )
    cold = SimpleNamespace(tier=Tier.DISK, writes=SimpleNamespace(queue=queue), reads=queue)
    hierarchy = SimpleNamespace(
        context=context,
        write_back=SimpleNamespace(to_host=queue),
        load_back=SimpleNamespace(queue=queue),
        colds=(cold,),
    )
    return SimpleNamespace(
        hierarchy=hierarchy,
        parts=SimpleNamespace(disk_store=disk, store=None),
        token_to_kv_pool_allocator=SimpleNamespace(size=1 << 20),
        root_node=talk.root,
    )


def timed(call: Callable[[], object]) -> float:
    """Microseconds of this thread's processor time."""
    started = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - started) / 1e3


def measure(case: tuple[str, int, int], n_snapshots: int) -> list[Row]:
    """A row of the table for each part."""
    scheduler = Scheduler(*case)
    scheduler.snapshot()  # imports what a server has imported
    gc.collect()
    gc.freeze()
    clock_us = float(np.median([timed(lambda: None) for _ in range(200)]))
    rows = []
    for name in ("forest", "requests"):
        times, sizes, counts = [], [], []
        for _ in range(n_snapshots):
            scheduler.step()
            seen: dict[str, Any] = {}

            def note(name: str = name, seen: dict[str, Any] = seen) -> None:
                seen["part"] = getattr(scheduler.part(), name)()
                seen["bytes"] = ENCODE(seen["part"])

            times.append(max(0.0, timed(note) - clock_us))
            sizes.append(len(seen["bytes"]))
            counts.append(n_rows(seen["part"]))
        median, p99 = map(float, np.quantile(times, (0.5, 0.99)))
        mean_rows = float(np.mean(counts))
        rows.append(Row(*case, name, mean_rows, median, p99, max(times), max(sizes)))
    gc.unfreeze()
    return rows


def n_rows(part: dict[str, Any]) -> int:
    """Prefixes, or requests of all kinds."""
    if "prefixes" in part:
        return len(part["prefixes"])
    return sum(len(kind["rows"]) for kind in part.values() if isinstance(kind, dict))


def insert_costs(n_nodes: int, n_turns: int = 2_000) -> tuple[float, float]:
    """Median microseconds to record a turn: without the index, and with it."""
    found = []
    for is_watched in (False, True):
        talk = Conversations(n_nodes, is_watched=is_watched)
        gc.collect()
        gc.freeze()
        found.append(float(np.median([talk.turn() for _ in range(n_turns)])))
        gc.unfreeze()
    return found[0], found[1]


def report(rows: list[Row], inserts: tuple[float, float]) -> str:
    """The table as Markdown, and how it was made."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        "# What a snapshot costs the scheduler's thread",
        "",
        "Made by `python benchmark/micro/snapshot.py --out benchmark/results`; its `--help` says",
        "what a snapshot is. Microseconds of the thread's processor time on one of",
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}; load",
        f"averages at the end: {load}: other work ran beside it.",
        f"The budget is {BUDGET_US:,.0f} us at the 99th percentile of each part with 100,000 nodes",
        "and 10,000 waiting, under the policy slack.",
        "",
        "| policy | nodes | waiting | part | rows | median | p99 | longest | bytes at most |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
        "",
        f"Recording a turn (two new pages below {TURNS} nodes) in a forest of 100,000 nodes took",
        f"{inserts[0]:.0f} us without the index of the largest prefixes, {inserts[1]:.0f} us with",
        "it (medians).",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--snapshots", type=int, default=1_000, metavar="N", help="per case")
    parser.add_argument("--check", action="store_true", help="status 1 if the budget is exceeded")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write snapshot_cost.md there")
    arguments = parser.parse_args()
    rows = [row for case in CASES for row in measure(case, arguments.snapshots)]
    text = report(rows, insert_costs(CHECKED[1]))
    print(text)
    if arguments.out is not None:
        (arguments.out / "snapshot_cost.md").write_text(text)
    checked = [row for row in rows if (row.policy, row.n_nodes, row.n_waiting) == CHECKED]
    over = [row for row in checked if row.p99_us > BUDGET_US]
    for row in over if arguments.check else ():
        print(f"{row.part} is over the budget: {row.p99_us:,.0f} us", file=sys.stderr)
    if arguments.check and over:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
