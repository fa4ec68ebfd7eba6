"""What all actions on prompts work with, and how they take turns with everything else."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.descent import whole_pages
from tiered_kv.forest.key import page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.memory.demand import Expectation
from tiered_kv.memory.keeps import KeepBounds
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.disk.io_pool import DaemonThreads
from tiered_kv.tiers.hierarchy import KVHierarchy

T = TypeVar("T")

Rounds: TypeAlias = Generator[bool, bool, T]
"""An action, some of it in each round. It yields whether it only waits now, and is sent whether its
time is up. Rounds end after so many pages and nodes, never by the clock: ranks go through the same.
"""

#: What is looked at, hashed, granted or given up in one round: a moment of the scheduler's thread.
ROUND_NODES = 128
ROUND_PAGES = 128
ROUND_EVICTIONS = 16
#: Pages of one tier that keeps may cover, however large it is: each costs some hundred bytes.
KEPT_PAGES_MAX = 65536
#: Pages that are forgotten or touched in one call to a store: its readers wait meanwhile.
CALL_PAGES = 512


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in the tree below `root`."""

    root: Node
    tokens: array[int]
    """Its whole pages."""
    tail: array[int]
    """Its last tokens, which fill no page."""

    @classmethod
    def of(cls, root: Node, tokens: array[int], page_size: int) -> Prompt:
        n_whole = whole_pages(tokens, page_size, None)
        return cls(root, tokens[:n_whole], tokens[n_whole:])

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) + len(self.tail)

    def goes_on_with(self, tokens: array[int]) -> bool:
        """Whether a run of pages after its whole pages is one after the prompt itself."""
        return tokens[: len(self.tail)] == self.tail

    def children_of(self, last: Node) -> list[Node]:
        """What goes on from it, where its whole pages end with `last`."""
        return [child for child in last.children.values() if self.goes_on_with(child.tokens)]


@dataclass(slots=True)
class Means:
    """next_use: what is expected to be needed, by node id. disk_pages: that the disk has room for,
    the same on every rank. share: of a tier's pages, those that keeps may cover; tenant_share: of
    these, those of one tenant."""

    hierarchy: KVHierarchy
    threads: DaemonThreads
    next_use: Callable[[], Mapping[int, Expectation]] = dict
    disk_pages: int = 0
    share: float = 0.25
    tenant_share: float = 0.5

    @property
    def page_size(self) -> int:
        return self.hierarchy.context.page_size

    def minimum(self, values: list[int]) -> list[int]:
        return self.hierarchy.context.collective.minimum(values)

    def cold(self, tier: Tier) -> ColdTier | None:
        """The store of that tier, if there is one that is in use now."""
        colds = self.hierarchy.colds
        return next((cold for cold in colds if cold.tier is tier and not cold.is_away), None)

    def bounds(self, tier: Tier) -> KeepBounds:
        """How much of a tier may be kept."""
        n_pages = self.disk_pages
        if tier is Tier.HOST:
            n_pages = self.hierarchy.context.host.n_pages
        all_pages = min(int(self.share * n_pages), KEPT_PAGES_MAX)
        return KeepBounds(all_pages, int(self.tenant_share * all_pages))

    def path(self, prompt: Prompt, *, cuts: bool = False) -> tuple[list[tuple[Node, int]], bool]:
        """The nodes that a prompt goes through, each with how many of its tokens are the prompt's,
        and whether all of it is in the forest. cuts: the node in which it ends is split there."""
        forest = self.hierarchy.context.forest
        found = forest.peek(prompt.root, prompt.tokens)
        path = [(node, node.n_tokens) for node in found.path]
        if found.partial is not None:
            node = found.partial
            if cuts:
                node = forest.split(node, found.common // self.page_size)[0]
            path.append((node, found.common))
        return path, found.end == len(prompt.tokens)

    def rest_hashes(self, prompt: Prompt, path: Sequence[tuple[Node, int]]) -> Rounds[list[bytes]]:
        """The names of the pages that come after `path`."""
        size, hashes = self.page_size, list[PageHash]()
        parent, at = prompt.root.last_page_hash, 0
        if path:
            node, n_tokens = path[-1]
            at = node.start + n_tokens
            parent = node.page_hashes[n_tokens // size - 1]
        step = ROUND_PAGES * size
        for begin in range(at, len(prompt.tokens), step):
            hashes += page_hashes(parent, prompt.tokens[begin : begin + step], size)
            parent = hashes[-1]
            yield False
        return hashes

    def count_known(self, cold: ColdTier, hashes: Sequence[PageHash]) -> Rounds[int]:
        """How many of the leading pages a store has, on every rank, that knows without asking."""
        n_there = 0
        for at in range(0, len(hashes), ROUND_PAGES):
            part = hashes[at : at + ROUND_PAGES]
            (n_known,) = self.minimum([cold.known(part) or 0])
            n_there += n_known
            if n_known < len(part):
                break
            yield False
        return n_there

    def in_background(self, call: Callable[[], int]) -> Rounds[int | None]:
        """What `call` says, which may wait for a store; None if time is up before, on any rank."""
        future: Future[int] = self.threads.submit(call)
        is_late = False
        while not self.minimum([int(future.done())])[0]:
            if is_late:
                return None
            is_late = yield True
        failed = future.exception() is not None
        return self.minimum([0 if failed else future.result()])[0]


def names_of(node: Node, n_tokens: int, page_size: int) -> list[PageHash]:
    """Of the pages that the leading tokens of a node fill."""
    return node.page_hashes[: n_tokens // page_size]
