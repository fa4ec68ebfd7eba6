"""What a pretend engine serves, and what it is told: prompts, their KV, requests, events."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node

PAGE_SIZE = 4
N_LAYERS = 3
NAMESPACE = namespace_hash("a model")


def tokens_of(*pages: int, page_size: int = PAGE_SIZE, tail: int = 0) -> array[int]:
    """A prompt of whole pages, page p being the tokens (p * 1000, p * 1000 + 1, ...)."""
    run = [page * 1000 + i for page in pages for i in range(page_size)]
    return array("q", run + [7] * tail)


@lru_cache(maxsize=1 << 16)
def page_kv(page_hash: bytes, page_bytes: int) -> bytes:
    """What a forward pass computes for the page of this hash: `page_bytes` pseudo-random bytes."""
    return hashlib.shake_128(page_hash).digest(page_bytes)


@dataclass(eq=False)
class Request:
    """A running request: its lock, and its slots (the prefix's, then its own whole pages)."""

    tokens: array[int]
    root: Node
    locked: Node
    slots: torch.Tensor
    n_protected: int
    n_device: int
    n_host: int
    gate_index: int = -1


@dataclass
class Events:
    """Records what the hierarchy reports, page by page."""

    held: dict[Tier, list[bytes]] = field(default_factory=dict)
    moved: list[tuple[Tier, Tier, int]] = field(default_factory=list)
    #: Pages that the disk gave up by itself.
    gone: list[bytes] = field(default_factory=list)
    #: Pages that did not get where they were to be written.
    lost: dict[Tier, int] = field(default_factory=dict)

    def stored(self, node: Node, tier: Tier) -> None:
        held = self.held.setdefault(tier, [])
        # What a store had before is told again when it is read.
        held += [name for name in node.page_hashes if tier <= Tier.HOST or name not in held]

    def removed(self, node: Node, tier: Tier) -> None:
        for page_hash in node.page_hashes:
            # What a store gave up by itself may have been told before.
            if tier <= Tier.HOST or page_hash in self.held.get(tier, ()):
                self.held[tier].remove(page_hash)

    def dropped(self, page_hashes: Sequence[bytes], tier: Tier) -> None:
        self.gone += page_hashes
        held = self.held.setdefault(tier, [])
        for page_hash in page_hashes:
            if page_hash in held:
                held.remove(page_hash)

    def unwritten(self, target: Tier, n_pages: int) -> None:
        self.lost[target] = self.lost.get(target, 0) + n_pages

    def transferred(
        self, source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float
    ) -> None:
        assert n_bytes > 0 or n_pages == 0
        assert seconds >= 0
        self.moved.append((source, target, n_pages))
