"""The largest prefixes of a forest, kept as nodes come and go, so that a look at them costs little.

A prefix is as large as the tokens of its node and of all nodes below it. Nodes are kept in classes
by the power of two of their size: moving one is O(1), and the classes from the top are the largest
prefixes, to within a factor of two where the last class is cut. A change costs O(depth).
"""

from __future__ import annotations

from itertools import chain

from tiered_kv.forest.node import Node
from tiered_kv.forest.tree import Trees

#: Sizes are below 2 ** this.
_CLASSES = 64


class LargestPrefixes:
    """Attach it to an empty forest; it follows from there."""

    def __init__(self, forest: Trees) -> None:
        assert not len(forest), "it cannot know what is there already"
        self.sizes: dict[int, int] = {}
        """By node id, roots included: tokens of the node and below it. Read only."""
        self._classes: list[dict[Node, None]] = [{} for _ in range(_CLASSES)]
        self.tokens = 0
        """Of all nodes, in whatever tier they are."""
        forest.watch(self)

    def largest(self, n: int) -> list[Node]:
        """Up to `n` nodes, each behind its parent unless that is a root.

        Whoever is left out is at most twice as large as the smallest who is in. Looks at O(n)
        nodes, however many there are.
        """
        chosen: dict[Node, None] = {}
        for node in chain.from_iterable(reversed(self._classes)):
            if len(chosen) >= n:
                break
            if node in chosen:
                continue
            parent = node.parent
            assert parent is not None, "a node in the forest has a parent"
            if parent in chosen or parent.is_root:
                chosen[node] = None
            else:
                self._choose_path(node, chosen, n)
        return list(chosen)

    @staticmethod
    def _choose_path(node: Node, chosen: dict[Node, None], n: int) -> None:
        """`node` with its ancestors, which are no smaller: as far from the top as there is room."""
        path = []
        at = node
        # Ancestors of another class were chosen before; within a class the order is of no help.
        while not at.is_root and at not in chosen:
            path.append(at)
            parent = at.parent
            assert parent is not None, "a node in the forest has a parent"
            at = parent
        chosen.update(dict.fromkeys(reversed(path[-(n - len(chosen)) :])))

    # -- what happens to nodes (`NodeWatcher`) ------------------------------------------------

    def added(self, node: Node) -> None:
        """`node` is a new leaf."""
        n_tokens = len(node.tokens)
        self.tokens += n_tokens
        self.sizes[node.node_id] = n_tokens
        self._classes[n_tokens.bit_length()][node] = None
        self._change_above(node.parent, n_tokens)

    def removed(self, node: Node, parent: Node) -> None:
        """`node` was a leaf below `parent`."""
        n_tokens = self.sizes.pop(node.node_id)
        self.tokens -= n_tokens
        del self._classes[n_tokens.bit_length()][node]
        self._change_above(parent, -n_tokens)

    def split(self, upper: Node, lower: Node) -> None:
        """`upper` has taken the place of `lower`, which is below it now."""
        sizes = self.sizes
        size = sizes[lower.node_id]
        sizes[upper.node_id] = size
        self._classes[size.bit_length()][upper] = None
        rest = sizes[lower.node_id] = size - len(upper.tokens)
        if rest.bit_length() != size.bit_length():
            del self._classes[size.bit_length()][lower]
            self._classes[rest.bit_length()][lower] = None

    def cleared(self) -> None:
        """There are no nodes."""
        self.sizes.clear()
        for nodes in self._classes:
            nodes.clear()
        self.tokens = 0

    def _change_above(self, node: Node | None, n_tokens: int) -> None:
        """`node` and all above it are `n_tokens` larger."""
        sizes, classes = self.sizes, self._classes
        while node is not None:
            old = sizes.get(node.node_id, 0)
            new = old + n_tokens
            if node.root_hash is not None:
                if new:
                    sizes[node.node_id] = new
                else:
                    # So that trees that come and go leave nothing behind.
                    sizes.pop(node.node_id, None)
                return
            sizes[node.node_id] = new
            before, now = old.bit_length(), new.bit_length()
            if before != now:
                del classes[before][node]
                classes[now][node] = None
            node = node.parent
