"""Prompts brought nearer, and kept there for a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.actions import Load
from tiered_kv.tiers.control.means import ROUND_PAGES, Means, Prompt, Rounds, names_of

#: Of the device's pages that nobody uses now, so many at most make room for what is prefetched.
DEVICE_SHARE = 0.5


def prefetch(
    means: Means, prompts: Sequence[Prompt], target: Tier, name: str
) -> Rounds[dict[str, Any]]:
    """Brings them to the host, and from there to the device if that is the target.

    They come after everybody who waits, into room that nobody uses. name: of no request.
    """
    hierarchy = means.hierarchy
    tickets = [f"{name}.{n}" for n in range(len(prompts))]
    came = {"host": 0, "device": 0}
    try:
        is_late = False
        for ticket, prompt in zip(tickets, prompts, strict=True):
            anchor = hierarchy.peek(prompt.root, prompt.tokens)
            rest = prompt.tokens[anchor.end :]
            hierarchy.prefetch.request(ticket, anchor, rest, is_ahead=True)
            if ticket in hierarchy.prefetch.tickets:
                hierarchy.prefetch.tickets[ticket].at_any_cost = True
        while not (is_late or all(map(hierarchy.prefetch.is_settled, tickets))):
            is_late = yield True
        came["host"] = sum(map(hierarchy.prefetch.loaded_tokens, tickets))
        if target is Tier.DEVICE and not is_late:
            for prompt in prompts:
                came["device"] += yield from _to_device(means, prompt)
    finally:
        for ticket in tickets:
            hierarchy.prefetch.release(ticket)
    return {"done": came}


def _to_device(means: Means, prompt: Prompt) -> Rounds[int]:
    """Tokens that came."""
    hierarchy, context = means.hierarchy, means.hierarchy.context
    path, _ = means.path(prompt, cuts=True)
    run = [node for node, _ in path if node.state(Tier.DEVICE) is Residency.ABSENT]
    unused = context.forest.evictable_tokens(Tier.DEVICE)
    room = context.allocator.available() + int(DEVICE_SHARE * unused)
    started: list[Node] = []
    for node in run:
        room -= node.n_tokens
        is_there = node in context.forest and node.state(Tier.HOST) is Residency.RESIDENT
        if room < 0 or not is_there or node.state(Tier.DEVICE) is not Residency.ABSENT:
            break
        if not hierarchy.load_back.load_ahead(Load((node.node_id,), Tier.HOST, Tier.DEVICE)):
            break
        started.append(node)
        yield True
    is_late = False
    while not is_late and any(_is_loading(means, node) for node in started):
        is_late = yield True
    there = [node for node in started if node.state(Tier.DEVICE) is Residency.RESIDENT]
    return sum(node.n_tokens for node in there)


def _is_loading(means: Means, node: Node) -> bool:
    is_there = node in means.hierarchy.context.forest  # not after a flush
    return is_there and node.state(Tier.DEVICE) is Residency.LOADING


def keep(
    means: Means, prompts: Sequence[Prompt], tier: Tier, tenant: str, seconds: float
) -> Rounds[dict[str, Any]]:
    """Keeps what of them is on host and disk (tier HOST), or on disk, for `seconds`; 0: no longer.

    What the bounds have no room for is not kept, the end of each prompt first.
    """
    context = means.hierarchy.context
    keeps = context.manager.keeps
    means.hierarchy.learn()  # what time it is, as all ranks agree on it
    until_s = context.now_s + seconds
    done, beyond = {"host": 0, "disk": 0}, 0
    for prompt in prompts:
        path, _ = means.path(prompt, cuts=True)
        named = {Tier.DISK: [name for node, n in path for name in _names(means, node, n)]}
        if tier is Tier.HOST:
            named[Tier.HOST] = [n for node in _near(path) for n in node.page_hashes]
        rest = yield from means.rest_hashes(prompt, path)
        named[Tier.DISK] += yield from _on_disk(means, rest)
        if means.cold(Tier.DISK) is None:
            del named[Tier.DISK]
        for where, names in named.items():
            for at in range(0, len(names), ROUND_PAGES):
                part = names[at : at + ROUND_PAGES]
                if not seconds:
                    n_pages = keeps.release(where, part, tenant)
                else:
                    n_pages = keeps.grant(where, tenant, part, until_s, means.bounds(where))
                done[where.name.lower()] += n_pages * means.page_size
                yield False
                if seconds and n_pages < len(part):
                    beyond += (len(names) - at - n_pages) * means.page_size
                    break
    return {"done": done, "beyond_bounds": beyond, "ends_in_s": seconds}


def _names(means: Means, node: Node, n_tokens: int) -> list[PageHash]:
    return names_of(node, n_tokens, means.page_size)


def _near(path: Sequence[tuple[Node, int]]) -> list[Node]:
    """The leading nodes that the host has, or gets from the device."""
    near: list[Node] = []
    for node, _ in path:
        if all(node.state(tier) is Residency.ABSENT for tier in (Tier.DEVICE, Tier.HOST)):
            break
        near.append(node)
    return near


def _on_disk(means: Means, hashes: list[PageHash]) -> Rounds[list[PageHash]]:
    """The leading ones that the disk has."""
    cold = means.cold(Tier.DISK)
    if cold is None:
        return []
    n_there = yield from means.count_known(cold, hashes)
    return hashes[:n_there]
