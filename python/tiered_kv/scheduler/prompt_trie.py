"""What the prompts of waiting requests have in common, cached or not: a radix tree over them.

The forest knows what is cached; two waiting requests may share a prefix that nobody has computed
yet. Nodes count who is below them, so joining and leaving cost the depth of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator

from tiered_kv.forest.node import Tokens
from tiered_kv.scheduler.request import QueuedRequest


class TrieNode:
    """A run of tokens that one or more prompts have next; positions in the forest's units."""

    __slots__ = ("children", "computing", "end", "ends", "n_below", "parent", "prompt", "start")

    def __init__(self, parent: TrieNode | None, prompt: Tokens, start: int, end: int) -> None:
        self.parent = parent
        self.prompt = prompt
        """Of any of them, whole: the run is its part from `start` to `end`. Nothing is copied."""
        self.start = start
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
            node = self._roots[root_id] = TrieNode(None, tokens, 0, 0)
        while node.end < end:
            child = node.children.get(tokens[node.end])
            if child is None:
                child = TrieNode(node, tokens, node.end, end)
                node.children[tokens[node.end]] = child
                return child
            common = _common_end(child.prompt, tokens, child.start, min(child.end, end))
            node = child if common == child.end else _split(child, common)
        return node

    def _tidy(self, node: TrieNode) -> None:
        """Forget nodes that nobody needs, and undo splits that separate nobody any more."""
        while node.parent is not None and node.is_idle:
            parent = node.parent
            del parent.children[node.prompt[node.start]]
            node = parent
        if node.parent is None:
            if not node.children and node.is_idle:
                self._roots = {key: root for key, root in self._roots.items() if root is not node}
            return
        if len(node.children) == 1 and not node.ends:
            (child,) = node.children.values()
            if len(child.computing) == len(node.computing):
                child.start = node.start
                child.parent = node.parent
                node.parent.children[child.prompt[child.start]] = child


def _split(node: TrieNode, end: int) -> TrieNode:
    """Cut `node` at `end`; returns the new upper part. The lower keeps its identity."""
    assert node.parent is not None
    upper = TrieNode(node.parent, node.prompt, node.start, end)
    upper.n_below = node.n_below
    upper.computing = dict(node.computing)
    node.parent.children[upper.prompt[upper.start]] = upper
    node.start = end
    node.parent = upper
    upper.children[node.prompt[end]] = node
    return upper


def _common_end(one: Tokens, other: Tokens, start: int, end: int) -> int:
    """Up to where, in [start, end], both are the same from `start` on.

    Gallops, then halves: the cost is that of comparing about as many tokens as are common.
    """
    equal, stride = start, 64
    while equal < end:
        upto = min(equal + stride, end)
        if one[equal:upto] != other[equal:upto]:
            break
        equal = upto
        stride *= 2
    else:
        return end
    while upto - equal > 1:
        middle = (equal + upto) // 2
        if one[equal:middle] == other[equal:middle]:
            equal = middle
        else:
            upto = middle
    return equal
