"""Actions of administrators on one hierarchy, a round at a time.

Every rank of a server begins the same actions and goes through the same rounds, at the same points
of its loop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.tiers.control.bringing import keep, prefetch
from tiered_kv.tiers.control.clearing import demote, drop
from tiered_kv.tiers.control.looking import inspect
from tiered_kv.tiers.control.means import CALL_PAGES, Means, Prompt, Rounds
from tiered_kv.tiers.page_store import PageStore

#: Actions that are under way, or whose outcome nobody has fetched; the oldest is given up.
OPEN_MAX = 8
#: So often the disk is told that what is kept there is used.
TOUCH_S = 20.0


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done. tier: how near (prefetch), where (keep), or how far (demote)."""

    action: str
    tier: Tier = Tier.HOST
    tenant: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class _Open:
    rounds: Rounds[dict[str, Any]]
    is_begun: bool = False
    waits: bool = False
    outcome: dict[str, Any] | None = None


class CacheControl:
    """Actions by the names that whoever asks for them gives."""

    def __init__(self, means: Means) -> None:
        self.means = means
        self._open: dict[str, _Open] = {}
        self._touching: Future[None] | None = None
        self._touched_s = 0.0

    def begin(self, name: str, order: Order, prompts: Sequence[Prompt]) -> None:
        """The first round is the first call of `go_on`."""
        self.end(name)
        while len(self._open) >= OPEN_MAX:
            self.end(next(iter(self._open)))
        self._open[name] = _Open(self._rounds(name, order, prompts))

    def _rounds(self, name: str, order: Order, prompts: Sequence[Prompt]) -> Rounds[dict[str, Any]]:
        """The action, and where the prompts lie then."""
        means, outcome = self.means, dict[str, Any]()
        if order.action == "prefetch":
            outcome = yield from prefetch(means, prompts, order.tier, f"order {name}")
        elif order.action == "keep":
            outcome = yield from keep(means, prompts, order.tier, order.tenant, order.seconds)
        elif order.action == "demote":
            outcome = yield from demote(means, prompts, order.tier)
        elif order.action == "drop":
            outcome = yield from drop(means, prompts)
        found = yield from inspect(means, prompts)
        return found | outcome

    def go_on(self, name: str, *, is_late: bool) -> tuple[dict[str, Any] | None, bool]:
        """A round: (the outcome, once there is one; whether it only waits until the next round).

        Raises KeyError for an action that nobody knows (any more).
        """
        action = self._open[name]
        if action.outcome is None:
            try:
                if action.is_begun:
                    action.waits = action.rounds.send(is_late)
                else:
                    action.is_begun = True
                    action.waits = next(action.rounds)
            except StopIteration as over:
                action.outcome = over.value
        return action.outcome, action.waits

    def end(self, name: str) -> None:
        """Its outcome was fetched, or nobody wants it."""
        action = self._open.pop(name, None)
        if action is not None:
            action.rounds.close()

    def polled(self) -> None:
        """Now and then: what is kept on disk is not to be the first to go there."""
        keeps, now_s = self.means.hierarchy.context.manager.keeps, time.monotonic()
        if not keeps or now_s - self._touched_s < TOUCH_S:
            return
        self._touched_s = now_s
        cold = self.means.cold(Tier.DISK)
        names = keeps.pages(Tier.DISK)
        is_over = self._touching is None or self._touching.done()
        if cold is not None and names and is_over:
            call = partial(_touch_all, cold.last_store, names)
            self._touching = self.means.threads.submit(call)


def _touch_all(store: PageStore, names: list[PageHash]) -> None:
    """On a thread of its own."""
    for at in range(0, len(names), CALL_PAGES):
        store.touch(names[at : at + CALL_PAGES])
