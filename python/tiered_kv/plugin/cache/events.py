"""Upstream's KV cache events (`--kv-events-config`), with the tier of every block.

A block is a page; its hash is the head of our own chained page hash, so it also tells namespaces
(adapters, tenants) apart. Cache-aware routers read these events (disaggregation/kv_events.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    StorageMedium,
)

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node

MEDIUM = {
    Tier.DEVICE: StorageMedium.GPU,
    Tier.HOST: StorageMedium.CPU,
    Tier.DISK: StorageMedium.DISK,
    Tier.REMOTE: StorageMedium.EXTERNAL,
}


def block_hash(page_hash: bytes) -> int:
    """The signed 64-bit number that upstream's events carry."""
    return int.from_bytes(page_hash[:8], "big", signed=True)


class KvEvents:
    """Collects events between two calls of `take`; does nothing unless enabled."""

    def __init__(self, page_size: int, enabled: bool) -> None:
        self._page_size = page_size
        self._enabled = enabled
        self._queue: list[Any] = []

    def take(self) -> list[Any]:
        events, self._queue = self._queue, []
        return events

    def cleared(self) -> None:
        if self._enabled:
            self._queue.append(AllBlocksCleared())

    def stored(self, node: Node, tier: Tier) -> None:
        if not self._enabled:
            return
        parent = node.parent
        parent_hash = None
        if parent is not None and not parent.is_root:
            parent_hash = block_hash(parent.last_page_hash)
        for i, page_hash in enumerate(node.page_hashes):
            page = node.tokens[i * self._page_size : (i + 1) * self._page_size]
            self._queue.append(
                BlockStored(
                    block_hashes=[block_hash(page_hash)],
                    parent_block_hash=parent_hash,
                    token_ids=page.tolist(),
                    block_size=self._page_size,
                    lora_id=None,
                    medium=MEDIUM[tier],
                )
            )
            parent_hash = block_hash(page_hash)

    def removed(self, node: Node, tier: Tier) -> None:
        self.dropped(node.page_hashes, tier)

    def dropped(self, page_hashes: Sequence[bytes], tier: Tier) -> None:
        if self._enabled and page_hashes:
            hashes = [block_hash(page_hash) for page_hash in page_hashes]
            self._queue.append(BlockRemoved(block_hashes=hashes, medium=MEDIUM[tier]))
