"""Belady's clairvoyant replacement (IBM Systems Journal, 1966): the limit for any eviction policy.

It reads the whole workload beforehand, so it is for workloads whose arrivals depend on no answer.
"""

from __future__ import annotations

import math

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import PageHash
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash, page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.simulation.live import LiveRequest
from tiered_kv.simulation.workload.request import Workload, whole_blocks


class Clairvoyance:
    """Knows by which requests each block will be used. A use is ahead until its admission."""

    def __init__(self, workload: Workload) -> None:
        """Raises ConfigError if requests of `workload` follow from answers."""
        root_hash = namespace_hash("simulation")
        arrivals: list[tuple[float, int, list[PageHash]]] = []
        for request in workload.initial():
            if request.next_use_hint_s is not None:
                raise ConfigError(
                    f"The policy belady must know all arrivals beforehand, but those of "
                    f"{workload.name} depend on answers; use kvflow."
                )
            blocks = whole_blocks(request, workload.block_tokens)
            pages = page_hashes(root_hash, blocks, 1)
            arrivals.append((request.arrival_s, request.request_id, pages))
        # By page, the next use last, so that uses that were made are popped off the end.
        self._uses: dict[PageHash, list[tuple[float, int]]] = {}
        for arrival_s, request_id, pages in reversed(arrivals):
            for page in pages:
                self._uses.setdefault(page, []).append((arrival_s, request_id))
        self._admitted: set[int] = set()
        self.touched: list[int] = []

    def next_use_s(self, node: Node) -> float:
        """See `Foresight.next_use_s`."""
        return self._next_use_s(node.page_hashes[-1])

    def on_split(self, upper: Node, lower: Node) -> None:
        """Nothing to do: uses are known by page."""

    def on_arrival(self, live: LiveRequest, now_s: float) -> None:
        """Nothing to do: a use is made at its admission."""

    def on_admission(self, live: LiveRequest) -> None:
        """See `Foresight.on_admission`."""
        self._admitted.add(live.queued.request_id)

    def on_finish(self, live: LiveRequest, forest: Forest, now_s: float) -> None:  # noqa: ARG002
        """Parts of a node that are needed at different times become nodes of their own."""
        node = live.pinned
        while node is not None and not node.is_root:
            parent = node.parent
            self.touched.append(node.node_id)
            while (n_pages := self._first_part(node)) < node.n_pages:
                # The lower half stays the node; what was cut off lies above it and is done.
                self.touched.append(forest.split(node, n_pages)[0].node_id)
            node = parent

    def _first_part(self, node: Node) -> int:
        """How many leading pages are next used when the first one is; later pages not sooner."""
        pages = node.page_hashes
        first_s = self._next_use_s(pages[0])
        low, high = 1, len(pages)
        if self._next_use_s(pages[-1]) == first_s:
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self._next_use_s(pages[middle - 1]) == first_s:
                low = middle
            else:
                high = middle
        return low

    def _next_use_s(self, page: PageHash) -> float:
        uses, admitted = self._uses.get(page), self._admitted
        while uses and uses[-1][1] in admitted:
            uses.pop()
        return uses[-1][0] if uses else math.inf
