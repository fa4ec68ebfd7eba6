"""Finding the longest known prefix: pure functions over nodes and token arrays.

All comparisons are of array slices, page-aligned, and nothing recurses: a prompt may be one node
of thousands of pages, or thousands of nodes of one page.
"""

from __future__ import annotations

from typing import NamedTuple

from tiered_kv.forest.key import TOKEN_TYPECODE
from tiered_kv.forest.node import Node, Tokens


class Descent(NamedTuple):
    """How far a prompt can be followed below a node."""

    path: list[Node]
    """Nodes matched in full."""
    position: int
    """Tokens matched, those of `partial` not included, and those before `begin`."""
    partial: Node | None
    """The node in which the prompt diverges or ends, if it does so inside one."""
    common: int
    """Tokens of `partial` matched: at least a page, less than the node."""

    @property
    def end(self) -> int:
        """Tokens matched in all, and those before `begin`."""
        return self.position + self.common


def whole_pages(tokens: Tokens, page_size: int, limit: int | None) -> int:
    """How many of the first `limit` tokens fill whole pages, in tokens."""
    if tokens.typecode != TOKEN_TYPECODE:
        raise TypeError(f"Tokens must be an array('q'), not an array({tokens.typecode!r}).")
    n_tokens = len(tokens)
    if limit is not None and limit < n_tokens:
        n_tokens = max(limit, 0)
    return n_tokens - n_tokens % page_size


def descend(node: Node, tokens: Tokens, end: int, page_size: int, begin: int = 0) -> Descent:
    """Follow `tokens[begin:end]` (whole pages) from `node` down as far as they are known.

    Positions in the answer count from the beginning of `tokens`.
    """
    path: list[Node] = []
    position = begin
    while position < end:
        child = node.children.get(tokens[position : position + page_size].tobytes())
        if child is None:
            break
        run = child.tokens
        stop = position + len(run)
        # The key is the first page, so a node of one page has been compared already.
        if len(run) != page_size and (stop > end or run != tokens[position:stop]):
            common = common_tokens(run, tokens, position, end, page_size)
            if common < len(run):
                return Descent(path, position, child, common)
        path.append(child)
        position = stop
        node = child
    return Descent(path, position, None, 0)


def common_tokens(run: Tokens, tokens: Tokens, begin: int, end: int, page_size: int) -> int:
    """Tokens in the common leading pages of `run` and `tokens[begin:end]`; the first page is known.

    Gallops (1, 2, 4, ... pages, then a binary search in the last stride): the cost is that of
    comparing about as many tokens as are common, however long both sides are.
    """
    n_pages = min(len(run), end - begin) // page_size
    equal, stride = 1, 1
    while equal < n_pages:
        upto = min(equal + stride, n_pages)
        if not _equal(run, tokens, begin, equal * page_size, upto * page_size):
            break
        equal = upto
        stride *= 2
    else:
        return equal * page_size
    while upto - equal > 1:
        middle = (equal + upto) // 2
        if _equal(run, tokens, begin, equal * page_size, middle * page_size):
            equal = middle
        else:
            upto = middle
    return equal * page_size


def _equal(run: Tokens, tokens: Tokens, begin: int, first: int, last: int) -> bool:
    return run[first:last] == tokens[begin + first : begin + last]
