"""Snapshots of a forest with everything in it that a page can show, as a server would send them."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmark.micro.snapshot import PAGE_SIZE, TURNS, Scheduler
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency
from tiered_kv.snapshot.schema import shaped
from tiered_kv.view.recording import Line, Recorder

NOWHERE: dict[str, Any] = {
    "version": 1,
    "at_s": 1000.0,
    "scheduler_us": 90,
    "page_tokens": 64,
    "policy": "slack",
    "model": "demo",
    "tiers": [
        {
            "tier": tier,
            "capacity_tokens": 65536,
            "resident_tokens": 0,
            "forest_tokens": 0,
            "pinned_tokens": 0,
            "state": "",
        }
        for tier in ("device", "host", "disk")
    ],
    "edges": [],
    "forest": {
        "count": 0,
        "tokens": 0,
        "rest": {"count": 0, "tokens": 0, "resident_tokens": {}},
        "trees": [],
        "prefixes": [],
    },
    "requests": {kind: {"count": 0, "rows": []} for kind in ("running", "parked", "prefilling")}
    | {"waiting": {"count": 0, "held": 0, "in_time": 0, "rows": []}},
    "hits": dict.fromkeys(("requests", "prompt_tokens", "device", "host", "disk", "store"), 0),
}
"""What a server shows that has just started."""


def over_the_wire(raw: dict[str, Any]) -> dict[str, Any]:
    """As it arrives in the HTTP server's process."""
    decoded: dict[str, Any] = msgspec.msgpack.decode(
        msgspec.msgpack.encode(raw), strict=False, type=dict[str, Any]
    )
    return decoded


class Story:
    """A scheduler whose forest, queue and counters change from snapshot to snapshot."""

    def __init__(self, n_nodes: int = 300, n_waiting: int = 40) -> None:
        self.scheduler = Scheduler("slack", n_nodes, n_waiting, n_documents=6)
        self.random = random.Random(4)
        self._place()
        self._park()

    def _place(self) -> None:
        """Two conversations of three are on the host, too; one of these is only there, and one on
        its way back."""
        forest, last = self.scheduler.talk.forest, self.scheduler.talk.last
        for number, begin in enumerate(range(0, len(last), TURNS)):
            turns = last[begin : begin + TURNS]
            if number % 3 == 0:
                continue
            for node in turns:
                forest.set_resident(node, Tier.HOST, range(node.n_pages))
            if number % 3 == 1:
                for node in reversed(turns):
                    forest.evict(node, Tier.DEVICE)
            if number == 1:
                slots = range(turns[0].n_pages)
                forest.start_transfer(turns[0], Tier.DEVICE, Residency.LOADING, slots, 1)

    def _park(self) -> None:
        """Some of those who run skip the iteration."""
        lives, running = self.scheduler.lives, self.scheduler.scheduler.running_batch.reqs
        now_s = time.perf_counter()
        for req in running:
            queued = req.tiered_kv_queued
            lives.queue(queued, now_s)
            lives.admit(queued, now_s)
            queued.output_tokens = len(req.output_ids)
            lives.token(queued)
            queued.first_token_s = now_s - self.random.uniform(1, 3)
        lives.park(req.tiered_kv_queued.request_id for req in running[::9])

    def snapshot(self, at_s: float) -> dict[str, Any]:
        """The next one, as the server serves it."""
        scheduler = self.scheduler
        scheduler.step()
        watched = scheduler.talk.watched
        assert watched is not None
        watched.polled()
        for name, more in (("requests", 2), ("prompt_tokens", 4000), ("device", 900)):
            watched.hits[name] += more
        watched.hits["host"] += self.random.randrange(1500)
        watched.hits["disk"] += self.random.randrange(800)
        moved = scheduler.cache.hierarchy.context.moved_bytes
        for edge, most in (((0, 1), 90), ((1, 0), 40), ((1, 2), 60), ((2, 1), 9)):
            key = Tier(edge[0]), Tier(edge[1])
            moved[key] = moved.get(key, 0) + self.random.randrange(most) * 1_000_000
        raw = scheduler.snapshot()
        return {**shaped(over_the_wire(raw), at_s=at_s), "model": "demo"}


def record(path: Path, n: int = 5, *, every_s: float = 1.0, lost: int = 0) -> list[dict[str, Any]]:
    """Writes a recording of `n` snapshots, then of `lost` moments without the server."""
    story, recorder = Story(), Recorder(path)
    snapshots = []
    for at in range(n):
        snapshots.append(story.snapshot(1000.0 + at * every_s))
        recorder.add(Line(1000.0 + at * every_s, snapshots[-1]))
    for at in range(n, n + lost):
        recorder.add(Line(1000.0 + at * every_s, None, "No server answers; start it."))
    recorder.close()
    return snapshots


assert NOWHERE["page_tokens"] == PAGE_SIZE
