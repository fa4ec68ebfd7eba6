"""Orders of an administrator, on a rig."""

from __future__ import annotations

import time
from array import array
from typing import Any

from support_tiers.doubles import PATIENCE_S
from support_tiers.tier_rig import Rig, tokens_of
from tiered_kv.forest.key import TreeKey
from tiered_kv.tiers.control.control import CacheControl, Order
from tiered_kv.tiers.control.means import Means, Prompt
from tiered_kv.tiers.disk.io_pool import DaemonThreads

PROMPT = tokens_of(1, 2, 3, 4, tail=1)
#: What LONGER goes on from.
PREFIX = tokens_of(1, 2, 3, 4)
LONGER = tokens_of(1, 2, 3, 4, 5, 6)
OTHER = tokens_of(1, 2, 8, 9)
INSPECT = Order("inspect")


def tiers(device: int, host: int, disk: int) -> dict[str, int]:
    """Of pages of four tokens."""
    return {"device": 4 * device, "host": 4 * host, "disk": 4 * disk}


def control_of(rig: Rig, *, disk_pages: int = 1000, share: float = 1.0) -> CacheControl:
    """tenant_share is a half."""
    means = Means(rig.hierarchy, DaemonThreads(1, "orders"), disk_pages=disk_pages, share=share)
    return CacheControl(means)


def prompts_of(rig: Rig, *prompts: array[int], key: TreeKey | None = None) -> list[Prompt]:
    root = rig.hierarchy.root(key)
    return [Prompt.of(root, tokens, rig.page_size) for tokens in prompts]


def carry_out(
    rig: Rig,
    order: Order,
    *prompts: array[int],
    control: CacheControl | None = None,
    rounds_max: int | None = None,
) -> dict[str, Any]:
    """Polls between the rounds; after `rounds_max` time is up."""
    control = control or control_of(rig)
    control.begin("o", order, prompts_of(rig, *prompts))
    deadline, n = time.monotonic() + PATIENCE_S, 0
    while True:
        is_late = rounds_max is not None and n >= rounds_max
        outcome, waits = control.go_on("o", is_late=is_late)
        if outcome is not None:
            control.end("o")
            rig.check()
            return outcome
        assert time.monotonic() < deadline, f"not over: {rig.forest.view()}"
        if waits:
            time.sleep(0.0005)
        n += 1
        rig.hierarchy.poll()
