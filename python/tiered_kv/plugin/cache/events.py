"""Upstream's KV cache events (`--kv-events-config`), with the tier of every block.

A block is a page; its hash is the head of our own chained page hash, so equal hashes are equal
tokens of one tree. Cache-aware routers read these events (disaggregation/kv_events.py), and many
find blocks by their tokens and parents alone, so these tell trees apart as well: the first block of
a salted tree hangs below the tree's own hash, where no unsalted request looks, and an adapter's
blocks carry a number made of its contents as `lora_id`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    StorageMedium,
)

from tiered_kv.core.ids import Tier
from tiered_kv.forest.inputs import token_ids
from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.node import Node

MEDIUM = {
    Tier.DEVICE: StorageMedium.GPU,
    Tier.HOST: StorageMedium.CPU,
    Tier.DISK: StorageMedium.DISK,
    Tier.STORE: StorageMedium.EXTERNAL,
}


def block_hash(page_hash: bytes) -> int:
    """The signed 64-bit number that upstream's events carry."""
    return int.from_bytes(page_hash[:8], "big", signed=True)


def is_salted(key: TreeKey) -> bool:
    return key.salt is not None or key.extra_key is not None


def adapter_number(key: TreeKey) -> int | None:
    """A positive 63-bit number of an adapter's contents, None for the base model."""
    if key.adapter is None:
        return None
    return int.from_bytes(key.adapter[:8], "big") >> 1


class KvEvents:
    """Collects events between two calls of `take`; does nothing unless enabled.

    labels: what else the release's `BlockStored` says of blocks of a tree, by the field's name.
    """

    def __init__(
        self,
        page_size: int,
        enabled: bool,
        labels: Callable[[TreeKey], Mapping[str, str]] = lambda _: {},
    ) -> None:
        self._page_size = page_size
        self._enabled = enabled
        self._labels = labels
        self._queue: list[Any] = []

    def take(self) -> list[Any]:
        events, self._queue = self._queue, []
        return events

    def cleared(self) -> None:
        if self._enabled:
            self._queue.append(AllBlocksCleared())

    def stored(self, node: Node, tier: Tier) -> None:
        parent = node.parent
        if not self._enabled or parent is None:  # it left the forest meanwhile
            return
        key = parent.root.tree_key
        labels = self._labels(key)
        parent_hash = None
        # Who is told the salt tells the trees apart by that, and finds nothing below their hashes.
        if not parent.is_root or (is_salted(key) and "cache_salt" not in labels):
            parent_hash = block_hash(parent.last_page_hash)
        for i, page_hash in enumerate(node.page_hashes):
            page = node.tokens[i * self._page_size : (i + 1) * self._page_size]
            self._queue.append(
                BlockStored(
                    block_hashes=[block_hash(page_hash)],
                    parent_block_hash=parent_hash,
                    token_ids=token_ids(page),
                    block_size=self._page_size,
                    lora_id=adapter_number(key),
                    medium=MEDIUM[tier],
                    **labels,
                )
            )
            parent_hash = block_hash(page_hash)

    def removed(self, node: Node, tier: Tier) -> None:
        self.dropped(node.page_hashes, tier)

    def dropped(self, page_hashes: Sequence[bytes], tier: Tier) -> None:
        if self._enabled and page_hashes:
            hashes = [block_hash(page_hash) for page_hash in page_hashes]
            self._queue.append(BlockRemoved(block_hashes=hashes, medium=MEDIUM[tier]))
