"""What the prompts of waiting requests have in common, cached or not: a radix tree over them.

The forest knows what is cached; two waiting requests may share a prefix that nobody has computed
yet. Nodes count who is below them, so joining and leaving cost the depth of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from tiered_kv.forest.descent import common_tokens
from tiered_kv.forest.node import Tokens
from tiered_kv.scheduler.request import QueuedRequest


class TrieNode:
    """A run of tokens that one or more prompts have next; positions in the forest's units."""

    __slots__ = ("children", "computing", "end", "ends", "n_below", "parent", "tokens")

    def __init__(self, parent: TrieNode | None, tokens: Tokens, end: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.end = end
        """Tokens from the root to the end of this node, inclusive."""
        self.children: dict[int, TrieNode] = {}
        """By their first token."""
        self.ends: dict[int, QueuedRequest] = {}
        """Waiting requests whose prompt ends here, by id."""
        self.n_below = 0
        """Waiting requests that end here or below."""
        self.computing: dict[int, None] = {}
        """Ids of admitted requests that compute this part of their prompt now."""

    @property
    def is_idle(self) -> bool:
        return self.n_below == 0 and not self.computing


class PromptTrie:
    """Waiting requests by prompt, and those whose prompt is being computed.

    `add`, `start` and the removals take O(depth of the prompt in the tree), and compare its tokens
    once at the speed of array slices.
    """

    def __init__(self) -> None:
        self._roots: dict[int, TrieNode] = {}
        self._place: dict[int, TrieNode] = {}
        self._computing_at: dict[int, TrieNode] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._place)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._place

    def add(self, request: QueuedRequest) -> None:
        """`request` waits."""
        node = self._reach(request)
        node.ends[request.request_id] = request
        self._place[request.request_id] = node
        at: TrieNode | None = node
        while at is not None:
            at.n_below += 1
            at = at.parent

    def remove(self, request_id: int) -> None:
        """It waits no more. Raises KeyError if it did not."""
        node = self._place.pop(request_id)
        del node.ends[request_id]
        at: TrieNode | None = node
        while at is not None:
            at.n_below -= 1
            at = at.parent
        self._tidy(node)

    def start(self, request: QueuedRequest) -> None:
        """`request`, which does not wait any more, computes its prompt now."""
        node = self._reach(request)
        self._computing_at[request.request_id] = node
        at: TrieNode | None = node
        while at is not None:
            at.computing[request.request_id] = None
            at = at.parent

    def stop(self, request_id: int) -> None:
        """Its prompt is computed, or will not be; nothing happens if it was not started."""
        node = self._computing_at.pop(request_id, None)
        if node is None:
            return
        at: TrieNode | None = node
        while at is not None:
            del at.computing[request_id]
            at = at.parent
        self._tidy(node)

    def computing(self) -> tuple[int, ...]:
        """Ids of those who were started and not stopped."""
        return tuple(self._computing_at)

    def node(self, request_id: int) -> TrieNode:
        """Where the prompt of a waiting request ends. Raises KeyError for others."""
        return self._place[request_id]

    def path(self, request_id: int) -> Iterator[TrieNode]:
        """The nodes of its prompt, deepest first, without the root of its namespace."""
        at: TrieNode | None = self._place[request_id]
        while at is not None and at.parent is not None:
            yield at
            at = at.parent

    # -- internals ----------------------------------------------------------------------------

    def _reach(self, request: QueuedRequest) -> TrieNode:
        """The node at which the prompt ends, made if need be."""
        tokens, end = request.tokens, len(request.tokens)
        root_id = request.root.node_id
        node = self._roots.get(root_id)
        if node is None:
            node = self._roots[root_id] = TrieNode(None, tokens[:0], 0)
        position = 0
        while position < end:
            child = node.children.get(tokens[position])
            if child is None:
                child = TrieNode(node, tokens[position:], end)
                node.children[tokens[position]] = child
                return child
            common = common_tokens(child.tokens, tokens, position, end, 1)
            if common < len(child.tokens):
                child = _split(child, common)
            node = child
            position += common
        return node

    def _tidy(self, node: TrieNode) -> None:
        """Forget nodes that nobody needs, and undo splits that separate nobody any more."""
        while node.parent is not None and node.is_idle:
            parent = node.parent
            del parent.children[node.tokens[0]]
            node = parent
        if node.parent is None:
            if not node.children and node.is_idle:
                self._roots = {key: root for key, root in self._roots.items() if root is not node}
            return
        if len(node.children) == 1 and not node.ends:
            (child,) = node.children.values()
            if len(child.computing) == len(node.computing):
                child.tokens = node.tokens + child.tokens
                child.parent = node.parent
                node.parent.children[child.tokens[0]] = child


def _split(node: TrieNode, n_tokens: int) -> TrieNode:
    """Cut `node` after `n_tokens`; returns the new upper part. The lower keeps its identity."""
    assert node.parent is not None
    upper = TrieNode(node.parent, node.tokens[:n_tokens], node.end - len(node.tokens) + n_tokens)
    upper.n_below = node.n_below
    upper.computing = dict(node.computing)
    node.parent.children[upper.tokens[0]] = upper
    node.tokens = node.tokens[n_tokens:]
    node.parent = upper
    upper.children[node.tokens[0]] = node
    return upper
