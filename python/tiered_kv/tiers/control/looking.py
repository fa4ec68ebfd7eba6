"""Where prompts lie, who uses them, and when they are expected to be needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.keeps import KEEP_TIERS
from tiered_kv.tiers.control.means import ROUND_NODES, ROUND_PAGES, Means, Prompt, Rounds, names_of

#: Nodes below a prompt that are counted: more are said to be at least as many.
BELOW_NODES = 4096
_NEAR = (Tier.DEVICE, Tier.HOST)


class _Seen:
    """What was found of some prompts; pages that several have count once."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.nodes: set[int] = set()
        self.next_use_s: float | None = None
        self.probability = 0.0
        self.kept_until_s: dict[str, float] = {}

    def expect(self, means: Means, node: Node) -> None:
        expected = means.next_use().get(node.node_id)
        if expected is None:
            return
        if self.next_use_s is None or expected.starts_in_s < self.next_use_s:
            self.next_use_s, self.probability = expected.starts_in_s, expected.probability


def inspect(means: Means, prompts: Sequence[Prompt]) -> Rounds[dict[str, Any]]:
    """Tokens of the prompts by tier; `nowhere`: those that would have to be computed."""
    seen = _Seen()
    means.hierarchy.learn()  # what time it is: keeps end
    for prompt in prompts:
        path, is_whole = means.path(prompt)
        hashes: list[PageHash] = []
        last: Node | None = None
        for n, (node, n_tokens) in enumerate(path):
            if n % ROUND_NODES == ROUND_NODES - 1:
                yield False
            _count(means, seen, node, n_tokens)
            hashes += names_of(node, n_tokens, means.page_size)
            last = node
        n_known = len(hashes)
        rest = yield from means.rest_hashes(prompt, path)
        in_store = [
            n
            for node, n in path
            if Tier.STORE in means.hierarchy.context.forest.tiers
            and node.state(Tier.STORE) is Residency.RESIDENT
        ]
        yield from _count_stored(means, seen, hashes + rest, n_known, sum(in_store))
        if is_whole and last is not None:
            yield from _count_below(means, seen, prompt, last, path[-1][1])
    return _answer(means, seen, prompts)


def _count(means: Means, seen: _Seen, node: Node, n_tokens: int) -> None:
    """A node that the prompt goes through."""
    seen.expect(means, node)
    if node.node_id in seen.nodes:
        return
    seen.nodes.add(node.node_id)
    for tier in means.hierarchy.context.forest.tiers:
        if node.state(tier) is Residency.RESIDENT:
            seen.tokens[tier.name.lower()] += n_tokens
    if node.pins(Tier.DEVICE):
        seen.tokens["in_use"] += n_tokens
    if all(record.state is not Residency.RESIDENT for record in node.records):
        seen.tokens["nowhere"] += n_tokens
    keeps = means.hierarchy.context.manager.keeps
    for tier in KEEP_TIERS:
        for name in names_of(node, n_tokens, means.page_size) if keeps else ():
            until_s = keeps.until_s(tier, name)
            if until_s is not None:
                _count_kept(means, seen, tier, until_s)


def _count_kept(means: Means, seen: _Seen, tier: Tier, until_s: float) -> None:
    if until_s <= means.hierarchy.context.now_s:
        return
    name = tier.name.lower()
    seen.tokens[f"kept_{name}"] += means.page_size
    seen.kept_until_s[name] = max(until_s, seen.kept_until_s.get(name, 0.0))


def _count_stored(
    means: Means, seen: _Seen, hashes: list[PageHash], n_known: int, store_tokens: int
) -> Rounds[None]:
    """What is not in the forest (after the first `n_known` pages) the stores may have.

    store_tokens: of what is, those that a shared store is known to have; it may have more.
    """
    size, rest = means.page_size, hashes[n_known:]
    at = 0
    for cold in means.hierarchy.colds:
        if cold.is_away or not hashes:
            continue
        if cold.traits.knows_locally:
            n_there = yield from means.count_known(cold, rest)
            seen.tokens[cold.name] += n_there * size
            at = max(at, n_there)
            continue
        n_found = yield from means.in_background(partial(cold.last_store.lookup, hashes))
        n_leading = max(0, (n_found or 0) - n_known)
        n_more = max(0, min(n_found or 0, n_known) * size - store_tokens)
        seen.tokens[cold.name] += n_leading * size + n_more
        at = max(at, n_leading)
    seen.tokens["nowhere"] += (len(rest) - at) * size
    keeps = means.hierarchy.context.manager.keeps
    for n, name in enumerate(rest if keeps else ()):
        until_s = keeps.until_s(Tier.DISK, name)
        if n % ROUND_PAGES == ROUND_PAGES - 1:
            yield False
        if until_s is not None:
            _count_kept(means, seen, Tier.DISK, until_s)


def _count_below(
    means: Means, seen: _Seen, prompt: Prompt, last: Node, n_tokens: int
) -> Rounds[None]:
    """What goes on from a prompt, to which the first `n_tokens` of its last node belong."""
    if n_tokens == last.n_tokens:
        unseen = prompt.children_of(last)
    elif prompt.goes_on_with(last.tokens[n_tokens:]):
        unseen = list(last.children.values())
        seen.tokens["below"] += last.n_tokens - n_tokens
    else:
        return
    n = 0
    while unseen and n < BELOW_NODES:
        node = unseen.pop()
        n += 1
        if n % ROUND_NODES == 0:
            yield False
        if node in means.hierarchy.context.forest:
            seen.expect(means, node)
            seen.tokens["below"] += node.n_tokens
            unseen += node.children.values()


def _answer(means: Means, seen: _Seen, prompts: Sequence[Prompt]) -> dict[str, Any]:
    context, tokens = means.hierarchy.context, seen.tokens
    names = [tier.name.lower() for tier in _NEAR] + [cold.name for cold in means.hierarchy.colds]
    kept = {
        name: {"tokens": tokens[f"kept_{name}"], "ends_in_s": max(0.0, end_s - context.now_s)}
        for name, end_s in seen.kept_until_s.items()
    }
    return {
        "prompts": len(prompts),
        "tokens": sum(prompt.n_tokens for prompt in prompts),
        "tiers": {name: tokens[name] for name in names},
        "nowhere": tokens["nowhere"],
        "in_use": tokens["in_use"],
        "below": tokens["below"],
        "kept": kept,
        "next_use_s": seen.next_use_s,
        "next_use_probability": seen.probability if seen.next_use_s is not None else None,
    }
