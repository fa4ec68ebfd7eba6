"""Prompts moved down, out of the near tiers, or forgotten, with all that goes on from them.

A prompt and what goes on from it is a part of the tree: the nodes below its end, and those above
it that nobody else goes on from. What a request or a transfer uses stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.keeps import KEEP_TIERS
from tiered_kv.tiers.control.means import (
    CALL_PAGES,
    ROUND_EVICTIONS,
    ROUND_NODES,
    Means,
    Prompt,
    Rounds,
)
from tiered_kv.tiers.page_store import PageStore

_NEAR = (Tier.DEVICE, Tier.HOST)

#: What may be in the way.
_IN_USE, _UNDER_WAY, _UNWRITTEN = "in use", "under way", "unwritten"


class _Part:
    """A part of the tree: its nodes, each before those above it, and where each began.

    Nodes may be split meanwhile: then their upper parts lie between.
    """

    def __init__(self, means: Means) -> None:
        self._means = means
        self.starts: dict[Node, int] = {}
        self._tops: dict[Node, None] = {}
        self.rest: list[PageHash] = []
        """Pages of the prompts that are not in the forest."""

    def take(self, prompt: Prompt) -> Rounds[None]:
        """Takes in a prompt and what goes on from it."""
        path, is_whole = self._means.path(prompt, cuts=True)
        self.rest += yield from self._means.rest_hashes(prompt, path)
        nodes = [node for node, _ in path]
        below = list(nodes[-1].children.values()) if nodes and is_whole else []
        found: list[Node] = []
        while below:
            node = below.pop()
            found.append(node)
            below += node.children.values()
            if len(found) % ROUND_NODES == 0:
                yield False
        self._add(reversed(found))
        while nodes and set(nodes[-1].children.values()) <= self.starts.keys():
            self._add([nodes.pop()])
        self._tops.update(dict.fromkeys(nodes))

    @property
    def shared_tokens(self) -> int:
        """Of the prompts, those that others go on from."""
        return sum(node.n_tokens for node in self._tops if node not in self.starts)

    def _add(self, nodes: Any) -> None:
        for node in nodes:
            self.starts.setdefault(node, node.start)

    def lowest_first(self, node: Node) -> list[Node]:
        """`node` and what was split off above it, as far as they are still in the forest."""
        found: list[Node] = []
        at: Node | None = node
        start = self.starts[node]
        while at is not None and at.parent is not None and at.end > start:
            found.append(at)
            at = at.parent
        return found


def demote(means: Means, prompts: Sequence[Prompt], target: Tier) -> Rounds[dict[str, Any]]:
    """Takes them out of the tiers nearer than `target`, once a farther one has them."""
    part = yield from _part_of(means, prompts)
    pending = dict.fromkeys(part.starts)
    done: Counter[str] = Counter()
    write_back = means.hierarchy.write_back
    is_late = False
    for n, node in enumerate(list(pending)):
        write_back.inserted([node])
        if target > Tier.HOST:
            write_back.resident_on_host([node])
        if n % ROUND_EVICTIONS == ROUND_EVICTIONS - 1:
            is_late = yield False
    left = yield from _until_done(
        means, pending, part, partial(_move, means, target, done), is_late
    )
    return {
        "done": {tier.name.lower(): done[tier.name] for tier in _NEAR if tier < target},
        "in_use": left[_IN_USE],
        "unwritten": left[_UNWRITTEN],
        "shared": part.shared_tokens,
    }


def drop(means: Means, prompts: Sequence[Prompt]) -> Rounds[dict[str, Any]]:
    """Forgets them in all tiers, and keeps of them."""
    part = yield from _part_of(means, prompts)
    done: Counter[str] = Counter()
    names: list[PageHash] = []
    pending = dict.fromkeys(part.starts)
    left = yield from _until_done(means, pending, part, partial(_forget, means, done, names), False)
    names += part.rest
    keeps = means.hierarchy.context.manager.keeps
    for at in range(0, len(names), CALL_PAGES):
        for tier in KEEP_TIERS:
            keeps.release(tier, names[at : at + CALL_PAGES])
        yield False
    answer = {tier.name.lower(): done[tier.name] for tier in _NEAR}
    for cold in means.hierarchy.colds:
        if not cold.is_away:
            n_pages = yield from means.in_background(partial(_drop_all, cold.last_store, names))
            answer[cold.name] = (n_pages or 0) * means.page_size
    return {"done": answer, "in_use": left[_IN_USE], "shared": part.shared_tokens}


def _drop_all(store: PageStore, names: list[PageHash]) -> int:
    """On a thread of its own."""
    parts = [names[at : at + CALL_PAGES] for at in range(0, len(names), CALL_PAGES)]
    return sum(map(store.drop, parts))


def _part_of(means: Means, prompts: Sequence[Prompt]) -> Rounds[_Part]:
    # The longest first: a prompt that another one goes on from shares nothing with it then.
    part = _Part(means)
    for prompt in sorted(prompts, key=lambda prompt: -prompt.n_tokens):
        yield from part.take(prompt)
    return part


def _until_done(
    means: Means, pending: dict[Node, None], part: _Part, step: Any, is_late: bool
) -> Rounds[Counter[str]]:
    """Does `step` with each node, lowest first, again while it waits for a transfer.

    Returns the tokens of those with which it could not be done, by why.
    """
    while True:
        left: Counter[str] = Counter()
        n = 0
        for node in list(pending):
            before = left.total()
            for at in part.lowest_first(node):
                n += 1
                n_tokens = at.n_tokens
                if why := step(at):
                    left[why] += n_tokens
            if left.total() == before:
                del pending[node]
            if n >= ROUND_EVICTIONS:
                n = 0
                is_late = (yield False) or is_late
        hierarchy = means.hierarchy
        is_moving = hierarchy.progress.is_busy or hierarchy.write_back.n_deferred
        if is_late or not is_moving or not (left[_UNDER_WAY] or left[_UNWRITTEN]):
            left[_IN_USE] += left[_UNDER_WAY]
            return left
        is_late = yield True


def _move(means: Means, target: Tier, done: Counter[str], node: Node) -> str:
    """ "" once it is in no tier nearer than `target`; else what is in the way."""
    for tier in _NEAR:
        if tier >= target or node.parent is None:
            break
        record = node.records[tier]
        if record.state is Residency.ABSENT:
            continue
        if tier is Tier.DEVICE:
            is_below = node.state(Tier.HOST) is Residency.RESIDENT
        else:
            colds = means.hierarchy.colds
            is_below = any(node.state(cold.tier) is Residency.RESIDENT for cold in colds)
        if not is_below:
            return _UNWRITTEN
        if record.state is not Residency.RESIDENT or record.pins or record.children_present:
            return _in_the_way(node)
        n_tokens = node.n_tokens
        means.hierarchy.context.give_up(node, tier)
        done[tier.name] += n_tokens
    return ""


def _in_the_way(node: Node) -> str:
    is_moving = any(record.op is not None for record in node.records)
    return _UNDER_WAY if is_moving else _IN_USE


def _forget(means: Means, done: Counter[str], names: list[PageHash], node: Node) -> str:
    """ "" once it is gone."""
    context = means.hierarchy.context
    if node.children or any(record.pins or record.op is not None for record in node.records):
        return _in_the_way(node)
    names += node.page_hashes
    n_tokens = node.n_tokens
    for tier in sorted(context.forest.tiers, reverse=True):
        if node.parent is not None and node.state(tier) is Residency.RESIDENT:
            if tier in _NEAR:
                done[tier.name] += n_tokens
                context.give_up(node, tier)
            else:  # Its pages are told by the store, once they are gone.
                context.forest.evict(node, tier)
    return ""
