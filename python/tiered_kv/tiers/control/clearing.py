"""Prompts moved down, out of the near tiers, or forgotten, with all that goes on from them.

A prompt and what goes on from it is a part of the tree: the nodes below its end, and those above
it that nobody else goes on from. What a request or a transfer uses stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.keeps import KEEP_TIERS
from tiered_kv.tiers.control.means import (
    CALL_PAGES,
    ROUND_EVICTIONS,
    ROUND_NODES,
    ROUND_PAGES,
    Means,
    Prompt,
    Rounds,
)
from tiered_kv.tiers.device import DeviceSlots
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.slots import PageIds

_NEAR = (Tier.DEVICE, Tier.HOST)

#: What may be in the way.
_IN_USE, _UNDER_WAY, _UNWRITTEN = "in use", "under way", "unwritten"


class _Part:
    """A part of the tree: its nodes, each before those above it, and where each began.

    Nodes may be split meanwhile: then their upper parts lie between.
    """

    def __init__(self, means: Means) -> None:
        self._means = means
        self.lowest_first: list[Node] = []
        self._starts: dict[Node, int] = {}
        self._tops: dict[Node, None] = {}
        self.rest: list[PageHash] = []
        """Pages of the prompts that are not in the forest."""

    @property
    def shared_tokens(self) -> int:
        """Of the prompts, those that others go on from."""
        return sum(node.n_tokens for node in self._tops if node not in self._starts)

    def take(self, prompt: Prompt) -> Rounds[None]:
        """Takes in a prompt and what goes on from it."""
        path, is_whole = self._means.path(prompt, cuts=True)
        self.rest += yield from self._means.rest_hashes(prompt, path)
        nodes = [node for node, _ in path]
        below = prompt.children_of(nodes[-1]) if nodes and is_whole else []
        found: list[Node] = []
        while below:
            node = below.pop()
            if node not in self._starts:
                found.append(node)
                self._starts[node] = node.start
                below += node.children.values()
            if len(found) % ROUND_NODES == 0:
                yield False
        self.lowest_first += reversed(found)
        while nodes and all(child in self._starts for child in nodes[-1].children.values()):
            node = nodes.pop()
            if node not in self._starts:
                self._starts[node] = node.start
                self.lowest_first.append(node)
        self._tops.update(dict.fromkeys(nodes))

    def pieces_of(self, node: Node) -> list[Node]:
        """`node` and what was split off above it, as far as they are still in the forest."""
        pieces: list[Node] = []
        at: Node | None = node
        while at is not None and at.parent is not None and at.end > self._starts[node]:
            pieces.append(at)
            at = at.parent
        return pieces


class _Clearing:
    """Takes nodes out of tiers; what they held on the device is free at the end of the round."""

    def __init__(self, means: Means) -> None:
        self._hierarchy = means.hierarchy
        self._slots: list[torch.Tensor] = []
        self.done: Counter[Tier] = Counter()
        self.names: list[PageHash] = []
        """Pages that were forgotten."""

    def move(self, target: Tier, node: Node) -> str:
        """ "" once it is in no tier nearer than `target`; else what is in the way."""
        for tier in _NEAR:
            if tier >= target or node.parent is None:
                break
            record = node.records[tier]
            if record.state is Residency.ABSENT:
                continue
            farther = [cold.tier for cold in self._hierarchy.colds]
            if tier is Tier.DEVICE:
                farther = [Tier.HOST]
            if all(node.state(one) is not Residency.RESIDENT for one in farther):
                return _UNWRITTEN
            if record.state is not Residency.RESIDENT or record.pins or record.children_present:
                return _in_the_way(node)
            self._take_out(node, tier)
        return ""

    def forget(self, node: Node) -> str:
        """ "" once it is gone; else what is in the way."""
        if node.children or any(record.pins or record.op is not None for record in node.records):
            return _in_the_way(node)
        self.names += node.page_hashes
        forest = self._hierarchy.context.forest
        for tier in sorted(forest.tiers, reverse=True):
            if node.parent is None or node.state(tier) is not Residency.RESIDENT:
                continue
            if tier in _NEAR:
                self._take_out(node, tier)
            else:  # Its pages are told by the store, once they are gone.
                forest.evict(node, tier)
        return ""

    def _take_out(self, node: Node, tier: Tier) -> None:
        context, n_tokens = self._hierarchy.context, node.n_tokens
        slots = context.take_out(node, tier)
        if tier is Tier.DEVICE:
            self._slots.append(cast(DeviceSlots, slots).tensor)
        else:
            context.free_host(cast(PageIds, slots))
        self.done[tier] += n_tokens

    def end_round(self) -> None:
        """Frees what was taken out: at once, as each call costs the engine's allocator the same."""
        if self._slots:
            self._hierarchy.context.allocator.free(torch.cat(self._slots))
            self._slots.clear()


def demote(means: Means, prompts: Sequence[Prompt], target: Tier) -> Rounds[dict[str, Any]]:
    """Takes them out of the tiers nearer than `target`, once a farther one has them."""
    part = yield from _part_of(means, prompts)
    write_back, clearing = means.hierarchy.write_back, _Clearing(means)
    for n, node in enumerate(part.lowest_first):
        pieces = part.pieces_of(node)
        write_back.inserted(pieces)
        if target > Tier.HOST:
            write_back.resident_on_host(pieces)
        if n % ROUND_EVICTIONS == ROUND_EVICTIONS - 1:
            yield False
    left = yield from _until_done(means, part, clearing, partial(clearing.move, target))
    return {
        "done": {tier.name.lower(): clearing.done[tier] for tier in _NEAR if tier < target},
        "in_use": left[_IN_USE],
        "unwritten": left[_UNWRITTEN],
        "shared": part.shared_tokens,
    }


def drop(means: Means, prompts: Sequence[Prompt]) -> Rounds[dict[str, Any]]:
    """Forgets them in all tiers, and keeps of them."""
    part = yield from _part_of(means, prompts)
    clearing = _Clearing(means)
    left = yield from _until_done(means, part, clearing, clearing.forget)
    context, names = means.hierarchy.context, clearing.names + part.rest
    for at in range(0, len(names), ROUND_PAGES):
        for tier in KEEP_TIERS:
            context.manager.keeps.release(tier, names[at : at + ROUND_PAGES])
        if context.beside is not None:
            context.beside.forget(names[at : at + ROUND_PAGES])
        yield False
    answer = {tier.name.lower(): clearing.done[tier] for tier in _NEAR}
    for cold in means.hierarchy.colds:
        if not cold.is_away:
            n_pages = yield from means.in_background(partial(_drop_all, cold.last_store, names))
            answer[cold.name] = (n_pages or 0) * means.page_size
    if context.beside is not None:
        yield from means.in_background(partial(context.beside.drop_stored, names))
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
    means: Means, part: _Part, clearing: _Clearing, step: Callable[[Node], str]
) -> Rounds[Counter[str]]:
    """Does `step` with each node, lowest first, again while it waits for a transfer.

    Returns the tokens of those with which it could not be done, by why.
    """
    todo, hierarchy, is_late = part.lowest_first, means.hierarchy, False
    while True:
        left: Counter[str] = Counter()
        again: list[Node] = []
        n = 0
        for node in todo:
            before = left.total()
            for at in part.pieces_of(node):
                n += 1
                n_tokens = at.n_tokens
                if why := step(at):
                    left[why] += n_tokens
            if left.total() > before:
                again.append(node)
            if n >= ROUND_EVICTIONS:
                n = 0
                clearing.end_round()
                is_late = (yield False) or is_late
        clearing.end_round()
        todo = again
        is_moving = hierarchy.progress.is_busy or hierarchy.write_back.n_deferred
        if is_late or not is_moving or not (left[_UNDER_WAY] or left[_UNWRITTEN]):
            left[_IN_USE] += left[_UNDER_WAY]
            return left
        is_late = yield True


def _in_the_way(node: Node) -> str:
    is_moving = any(record.op is not None for record in node.records)
    return _UNDER_WAY if is_moving else _IN_USE
