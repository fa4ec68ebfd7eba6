"""The server's tiers and the simulator's, driven through one history: the same pages lie where.

Both ask the same deciders, and differ in who carries it out: threads and bytes, or events. Each
step is let come to rest, so that what is compared does not depend on how long anything takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from support_simulation.builders import BLOCK_TOKENS, call, server
from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, tokens_of
from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.simulation.cache import TieredCache
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.live import LiveRequest, new_record, queued_request

pytestmark = pytest.mark.timeout(120)

TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)
N_DEVICE = 64
Places = dict[tuple[int, ...], tuple[bool, ...]]


class Simulated:
    """A `TieredCache` with a rig's operations."""

    def __init__(self, n_host: int) -> None:
        self.settings = server(
            device_blocks=N_DEVICE,
            host_blocks=n_host,
            disk_blocks=1000,
            page_tokens=BLOCK_TOKENS,
            stop_policy="patience",
        )
        self.events = EventQueue()
        self.cache = TieredCache(
            self.settings,
            BLOCK_TOKENS,
            self.events,
            lambda forest: MemoryManager(forest, MemoryConfig()),
        )
        self.n_calls = 0

    def serve(self, pages: list[int]) -> None:
        live, cache = self._live(pages), self.cache
        n_tokens = live.queued.prompt_tokens
        prefix = cache.load_back(live, cache.pin_prefix(live, n_tokens - 1))
        new = n_tokens - prefix.n_units * BLOCK_TOKENS
        assert cache.make_room(new)
        cache.take_private(live, new)
        self.rest()
        cache.commit(live, live.queued.tokens, n_tokens)
        cache.release(live)
        self.rest()

    def prefetch(self, pages: list[int]) -> int:
        live = self._live(pages)
        self.cache.prefetch(live)
        self.cache.poll()
        self.rest()
        self.cache.admitted(live)
        self.rest()
        return live.prefetched_tokens // BLOCK_TOKENS

    def drop(self, tier: Tier) -> None:
        self.cache._evict(tier, 1000)
        self.rest()

    def rest(self) -> None:
        while self.events.fire_next():
            pass
        self.cache.poll()
        assert not len(self.events)

    def _live(self, pages: list[int]) -> LiveRequest:
        self.n_calls += 1
        request = call(self.n_calls, self.events.now(), pages)
        queued = queued_request(request, self.settings, self.cache, self.events.now(), 0)
        return LiveRequest(request, queued, new_record(request))

    def places(self) -> Places:
        return _places(self.cache.forest, self.cache.root, 1)


class Served:
    """A rig with the same."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def serve(self, pages: list[int]) -> None:
        self.rig.serve(tokens_of(*pages, tail=1))
        self.rig.drain()

    def prefetch(self, pages: list[int]) -> int:
        n_tokens = self.rig.prefetch(f"{len(pages)}", tokens_of(*pages, tail=1))
        self.rig.drain()
        return n_tokens // PAGE_SIZE

    def drop(self, tier: Tier) -> None:
        if tier is Tier.DEVICE:
            self.rig.drop_from_device()
        else:
            self.rig.drop_from_host()
        self.rig.drain()

    def places(self) -> Places:
        return _places(self.rig.forest, self.rig.hierarchy.root(), PAGE_SIZE)


def _places(forest: Forest, root: Node, page_size: int) -> Places:
    """By the pages down to it: in which tiers each page is, that is in any."""
    names = {tuple(tokens_of(page)): page for page in range(200)} if page_size > 1 else None
    found: Places = {}

    def walk(node: Node, above: tuple[int, ...]) -> None:
        for at in range(0, len(node.tokens), page_size):
            page = tuple(node.tokens[at : at + page_size])
            above = (*above, names[page] if names else page[0])
            found[above] = tuple(
                node.state(tier) is Residency.RESIDENT for tier in forest.tiers[:3]
            )
        for child in node.children.values():
            walk(child, above)

    walk(root, ())
    return {name: tiers for name, tiers in found.items() if any(tiers)}


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        made.append(Rig(*args, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


def prompt(random: np.random.Generator) -> list[int]:
    """Up to three pages of one of four documents, and up to four of its own or others'."""
    document = 10 * int(random.integers(1, 5))
    shared = [document + at for at in range(int(random.integers(1, 4)))]
    return shared + [100 + int(random.integers(20)) for _ in range(int(random.integers(5)))]


@pytest.mark.parametrize("n_host", [5, 16, 40])
@pytest.mark.parametrize("seed", range(5))
def test_the_same_pages_lie_where(seed: int, n_host: int, make_rig: Callable[..., Rig]) -> None:
    random = np.random.default_rng(seed)
    both = Simulated(n_host), Served(make_rig(N_DEVICE, n_host, new_disk()))
    for step in range(60):
        kind = random.choice(["serve", "serve", "serve", "prefetch", "device", "host"])
        pages = prompt(random)
        came = []
        for one in both:
            if kind == "serve":
                one.serve(pages)
            elif kind == "prefetch":
                came.append(one.prefetch(pages))
            else:
                one.drop(Tier.DEVICE if kind == "device" else Tier.HOST)
        assert len(set(came)) <= 1, (step, kind, came)
        simulated, served = both[0].places(), both[1].places()
        assert simulated == served, (step, kind, pages)
