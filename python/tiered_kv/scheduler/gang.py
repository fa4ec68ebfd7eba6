"""Gangs: waiting requests whose prompts share what is worth computing, or reading, once.

A request's gang is that of the node of its prompt at which most prefill is saved: tokens of the
prefix times the members that need not compute them. That need not be the longest prefix it shares
with somebody. Nothing is stored per gang: counts in the tree of prompts are kept as requests come
and go, and the gang of the request whose turn it is is read from its path.

While a member computes a prefix that is not cached, the others are kept back: after the step they
find it on the device (BatchLLM, arXiv 2412.03594; upstream's in-batch prefix caching only sends
them to the end of its queue).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator

from tiered_kv.scheduler.prompt_trie import PromptTrie, TrieNode
from tiered_kv.scheduler.request import QueuedRequest


class Gangs:
    """Who belongs together, and who computes for whom. Positions in the forest's units."""

    def __init__(self) -> None:
        self._trie = PromptTrie()
        self._until_s: dict[int, float] = {}
        self._leaders: dict[int, QueuedRequest] = {}
        self._produced: dict[int, int] = {}
        self._ends: list[tuple[float, int]] = []
        self._of_last_pass: set[int] = set()
        """Who began or went on since it was last asked who expires."""

    def __len__(self) -> int:
        return len(self._trie)

    def add(self, request: QueuedRequest) -> None:
        """`request` waits; if it computed for others until now, it does so no more."""
        self.stop(request.request_id)
        if request.request_id not in self._trie:
            self._trie.add(request)

    def remove(self, request_id: int) -> None:
        """It does not wait any more, or never did; and computes for nobody."""
        if request_id in self._trie:
            self._trie.remove(request_id)
        self.stop(request_id)

    def lead(self, request: QueuedRequest, until_s: float) -> None:
        """`request` was admitted: others wait for what they share, until `until_s` at most."""
        request_id = request.request_id
        if request_id in self._trie:
            self._trie.remove(request_id)
        if request_id not in self._leaders:
            self._trie.start(request)
        self._leaders[request_id] = request
        self._produced[request_id] = request.output_tokens
        self.extend(request_id, until_s)

    def extend(self, request_id: int, until_s: float) -> None:
        """Its prefill is predicted to last until `until_s` now; nothing if it does not lead."""
        if request_id in self._leaders:
            self._until_s[request_id] = until_s
            self._of_last_pass.add(request_id)
            heapq.heappush(self._ends, (until_s, request_id))

    def stop(self, request_id: int) -> None:
        """It computes for nobody any more."""
        if self._leaders.pop(request_id, None) is not None:
            del self._until_s[request_id], self._produced[request_id]
            self._trie.stop(request_id)

    def expire(self, now_s: float) -> None:
        """Those whose prefill is over, or should be, compute for nobody any more.

        A pass that takes longer than predicted is not over before its results are taken, and where
        scheduling overlaps with passes, that is after the next one is planned: what was computed in
        the last one would be computed again. So nobody expires right behind it.
        """
        for request_id, request in list(self._leaders.items()):
            if request.output_tokens > self._produced[request_id]:
                self.stop(request_id)
        not_yet, self._of_last_pass = self._of_last_pass, set()
        kept = []
        while self._ends and self._ends[0][0] <= now_s:
            until_s, request_id = heapq.heappop(self._ends)
            if self._until_s.get(request_id) != until_s:
                continue
            if request_id in not_yet:
                kept.append((until_s, request_id))
            else:
                self.stop(request_id)
        for end in kept:
            heapq.heappush(self._ends, end)

    def is_leading(self, request_id: int) -> bool:
        """Whether others may wait for it."""
        return request_id in self._leaders

    @property
    def has_leaders(self) -> bool:
        """Whether anybody computes what others may wait for."""
        return bool(self._leaders)

    def node_of(self, request_id: int) -> TrieNode | None:
        """Where its gang branches off; None if it has nothing in common with anybody.

        The node on its path with the largest (members - 1) x prefix; the deepest of equals.
        """
        best, most = None, 0
        for node in self._trie.path(request_id):
            saved = (node.n_below - 1) * node.end
            if saved > most:
                best, most = node, saved
        return best

    def members(self, node: TrieNode) -> Iterator[QueuedRequest]:
        """Those that wait at or below `node`, lazily: reading k takes O(k), however many wait.

        Nobody may come or go meanwhile.
        """
        yield from node.ends.values()
        stack = [iter(node.children.values())]
        while stack:
            child = next(stack[-1], None)
            if child is None:
                stack.pop()
            elif child.n_below:
                yield from child.ends.values()
                stack.append(iter(child.children.values()))

    def path(self, request_id: int) -> list[TrieNode]:
        """The nodes of a waiting request's prompt, deepest first."""
        return list(self._trie.path(request_id))

    def computed_by_others(self, request_id: int, chosen: Collection[TrieNode]) -> int:
        """How far, in units, its prompt is being computed by others, or will be by those chosen.

        chosen: the nodes of the prompts of requests that come before it in the same plan.
        """
        for node in self._trie.path(request_id):
            if node.computing or node in chosen:
                return node.end
        return 0
