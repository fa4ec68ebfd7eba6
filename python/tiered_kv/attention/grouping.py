"""Which rows of a decode batch should read which shared tokens together: the best cuts of a tree.

The contexts of a batch form a tree. A cut at a node has everyone below it read the tokens from the
cut above (or the beginning) down to the node together: each of the group's tiles of queries reads
them once, instead of every row. Cuts along one path are levels. The cuts chosen save the most
tokens, less what they cost; with one level that is, per node u of the tree,

    best(u) = max((rows(u) - tiles(u)) * depth(u) - cost(u), sum of best(child))

and with more levels the same for every possible cut above u. A node is worth a cut only where rows
part, so the tree has fewer nodes than rows, and all is done in
O(levels x total length of the paths), the lengths counted in stretches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.forest.node import Node

Stretch = tuple[int, int]
"""(id, tokens) of a run of tokens that contexts may share, in the same slots."""


@dataclass(frozen=True, slots=True)
class Context:
    """What one row attends to."""

    n_tokens: int
    """Tokens of its context, the newest included, at least 1."""

    path: tuple[Stretch, ...] = ()
    """The stretches that the context begins with; what follows them is the row's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupingCosts:
    """What groups cost, in the unit of what they save: tokens of KV read in one layer."""

    per_group: int = 0
    per_row: int = 0
    """For every row at every level that it is in: its partial results are merged."""

    rows_per_tile: int = 1 << 30
    """Rows that one read of the shared KV can serve."""

    min_tokens: int = 1
    """Shared tokens below which a group is not considered."""

    def __post_init__(self) -> None:
        if min(self.per_group, self.per_row) < 0 or min(self.rows_per_tile, self.min_tokens) < 1:
            raise ValueError(f"Costs must be at least 0, tiles and lengths at least 1: {self}.")


def path_of(node: Node) -> tuple[Stretch, ...]:
    """The path from the root to `node`, which must be the last whose slots a request uses."""
    stretches = []
    at: Node | None = node
    while at is not None and not at.is_root:
        stretches.append((at.node_id, at.n_tokens))
        at = at.parent
    return tuple(reversed(stretches))


def best_plans(
    contexts: Sequence[Context], costs: GroupingCosts, max_levels: int
) -> list[CascadePlan]:
    """For at most 0, 1, ... `max_levels` levels, the plan that saves most; fewest cuts of equals.

    A stretch's id must stand for the same tokens and slots wherever it follows the same stretches.
    Raises ValueError if a path is longer than its context, or an id has two lengths.
    """
    root = _compress(_prefix_tree(contexts))
    top_down = list(_walk(root))
    for node in reversed(top_down):
        _solve(node, costs, max_levels)
    return [
        CascadePlan(len(contexts), _levels(root, n_levels)) for n_levels in range(max_levels + 1)
    ]


def saving(plan: CascadePlan, costs: GroupingCosts) -> int:
    """Tokens that `plan` saves in one layer, less what its groups cost."""
    return sum(_gain(len(g.rows), g.length, costs) for level in plan.levels for g in level.groups)


def _gain(n_rows: int, length: int, costs: GroupingCosts) -> int:
    n_tiles = -(-n_rows // costs.rows_per_tile)
    return (n_rows - n_tiles) * length - costs.per_group - n_rows * costs.per_row


@dataclass(slots=True)
class _Prefix:
    """A node of the tree of stretches."""

    tokens: int
    rows: list[int] = field(default_factory=list)
    children: dict[tuple[int, bool], _Prefix] = field(default_factory=dict)


def _prefix_tree(contexts: Sequence[Context]) -> _Prefix:
    """All rows' stretches, so cut that every row keeps a token of its own."""
    whole = {row for row, context in enumerate(contexts) if _is_whole(context)}
    # A stretch that ends a whole context ends a token earlier for that row, so there it is cut.
    cut_ids = {contexts[row].path[-1][0] for row in whole}
    root = _Prefix(0)
    for row, context in enumerate(contexts):
        at = root
        at.rows.append(row)
        last = len(context.path) - 1
        for i, (stretch, tokens) in enumerate(context.path):
            parts = [(tokens, False)]
            if stretch in cut_ids:
                parts = [(tokens - 1, False), (1, True)]
            if row in whole and i == last:
                parts.pop()
            for n_tokens, is_tail in parts:
                if not n_tokens:
                    continue
                child = at.children.setdefault((stretch, is_tail), _Prefix(n_tokens))
                if child.tokens != n_tokens:
                    raise ValueError(
                        f"The stretch {stretch} has {child.tokens} tokens in one context and "
                        f"{n_tokens} in that of row {row}; it must be the same in both."
                    )
                child.rows.append(row)
                at = child
    return root


def _is_whole(context: Context) -> bool:
    """Whether the path covers all of the context, so that its last token must be kept out."""
    if context.n_tokens < 1 or any(tokens < 1 for _, tokens in context.path):
        raise ValueError(f"A context and its stretches need at least one token each: {context}.")
    on_path = sum(tokens for _, tokens in context.path)
    if on_path > context.n_tokens:
        raise ValueError(
            f"A path of {on_path} tokens is longer than its context of {context.n_tokens}."
        )
    return on_path == context.n_tokens


@dataclass(slots=True)
class _Node:
    """Where rows part: everyone in `rows`, at least two, shares the first `depth` tokens."""

    depth: int
    rows: list[int]
    above: list[int]
    """Depths at which a cut above it may be, the beginning (0) first."""
    children: list[_Node] = field(default_factory=list)
    best: list[list[int]] = field(default_factory=list)
    """[levels left][nearest cut above]: most that this node and those below it can save."""
    is_cut: list[list[bool]] = field(default_factory=list)
    """Likewise: whether that takes a cut here."""


def _compress(prefix_root: _Prefix) -> _Node:
    """The tree without nodes that are no use as cuts: in a run of the same rows all but the last.

    The root stands for the beginning, which is no cut.
    """
    root = _Node(0, prefix_root.rows, [])
    stack = [(prefix_root, root)]
    while stack:
        prefix, node = stack.pop()
        for child in prefix.children.values():
            if len(child.rows) < 2:
                continue
            end, depth = child, node.depth + child.tokens
            while len(end.children) == 1:
                (below,) = end.children.values()
                if len(below.rows) < len(end.rows):
                    break
                end, depth = below, depth + below.tokens
            part = _Node(depth, end.rows, [*node.above, node.depth])
            node.children.append(part)
            stack.append((end, part))
    return root


def _walk(root: _Node) -> Iterator[_Node]:
    """Every node after the node above it. No recursion: a tree may be as deep as it has rows."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children)


def _solve(node: _Node, costs: GroupingCosts, max_levels: int) -> None:
    """Fill `best` and `is_cut`; the nodes below have theirs."""
    n_above = len(node.above)
    node.best.append([0] * n_above)
    node.is_cut.append([False] * n_above)
    for n_levels in range(1, max_levels + 1):
        # To a child, this node is one more place for a cut, after all that are above.
        below_cut = sum(child.best[n_levels - 1][n_above] for child in node.children)
        best, is_cut = [], []
        for i, start in enumerate(node.above):
            without = sum(child.best[n_levels][i] for child in node.children)
            length = node.depth - start
            value = without
            if length >= costs.min_tokens:
                value = max(value, _gain(len(node.rows), length, costs) + below_cut)
            best.append(value)
            is_cut.append(value > without)
        node.best.append(best)
        node.is_cut.append(is_cut)


def _levels(root: _Node, max_levels: int) -> tuple[Level, ...]:
    """The cuts that the solution for `max_levels` takes."""
    groups: list[list[Group]] = [[] for _ in range(max_levels)]
    stack = [(child, 0, 0) for child in root.children]
    while stack:
        node, cut_above, level = stack.pop()
        if level == max_levels:
            continue
        if node.is_cut[max_levels - level][cut_above]:
            start = node.above[cut_above]
            groups[level].append(Group(tuple(node.rows), start, node.depth - start))
            cut_above, level = len(node.above), level + 1
        stack.extend((child, cut_above, level) for child in node.children)
    return tuple(
        Level(tuple(sorted(found, key=lambda group: group.leader))) for found in groups if found
    )
