"""Where a scheduler takes orders, between two forward passes: a round of one at a time."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tiered_kv.core.ids import Tier
from tiered_kv.plugin.cache.adapters import tree_key
from tiered_kv.plugin.cache.idle import cache_of
from tiered_kv.plugin.control import messages
from tiered_kv.plugin.control.messages import ANSWER_KEY
from tiered_kv.plugin.requests.inputs import as_named
from tiered_kv.plugin.snapshots import collect
from tiered_kv.scheduler.session_prompts import SessionPrompt, SessionPrompts
from tiered_kv.tiers.control.control import OPEN_MAX, CacheControl, Order
from tiered_kv.tiers.control.means import Means, Prompt
from tiered_kv.tiers.disk.io_pool import DaemonThreads

if TYPE_CHECKING:
    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

NO_SESSIONS = (
    "Sessions are not known to a server that orders its queue by SGLang's own policy; name the "
    "prompt instead."
)
NO_STAGES = (
    "A server with --pp-size above 1 takes no orders about its cache, since its stages would have "
    "to agree on them in one pass."
)
NO_NAME = (
    "The weights have changed and nothing was computed with them yet, so nothing is cached; ask "
    "again after the next request."
)


def answer(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """AROUND `Scheduler.get_internal_state`. Every rank comes here; the first one is heard."""
    message = messages.read(recv_req.rid)
    cache = cache_of(scheduler)
    if message is None or cache is None:
        return collect.answer(original, scheduler, recv_req)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    desk: Desk | None = getattr(scheduler, "tiered_kv_desk", None)
    if desk is None:
        desk = scheduler.tiered_kv_desk = Desk(scheduler, cache)
    return GetInternalStateReqOutput(internal_state={ANSWER_KEY: desk.take(*message)})


class Desk:
    """Orders of one scheduler. Each answer is plain values, as msgpack takes them."""

    def __init__(self, scheduler: Any, cache: TieredPrefixCache) -> None:
        self._cache = cache
        order = getattr(scheduler, "tiered_kv_order", None)
        self._sessions: SessionPrompts | None = None if order is None else order.sessions
        args = scheduler.server_args
        means = Means(
            cache.hierarchy,
            DaemonThreads(1, "tiered-kv-orders"),
            next_use=dict if order is None else lambda: order.foretold.told,
            disk_pages=_disk_pages(cache),
            share=args.tiered_kv_keep_share / 100.0,
        )
        cache.control = self._control = CacheControl(means)
        self._prompts: dict[str, array[int]] = {}
        """Of orders that have not begun."""
        self._forgets: dict[str, tuple[str, str | None]] = {}
        """Sessions that are to be forgotten when an order is done."""

    def take(self, message: dict[str, Any], tokens: array[int]) -> dict[str, Any]:
        """One step of the order that the message names."""
        name, step = message["order"], message["step"]
        if step == messages.PROMPT:
            self._add(name, tokens)
        elif step == messages.BEGIN:
            return self._begin(name, message)
        elif step == messages.ROUND:
            return self._round(name, is_late=message["is_late"])
        else:
            self._end(name)
        return {"state": messages.MORE}

    def _add(self, name: str, tokens: array[int]) -> None:
        self._prompts.setdefault(name, array("q")).extend(tokens)
        while len(self._prompts) > OPEN_MAX:
            del self._prompts[next(iter(self._prompts))]

    def _begin(self, name: str, message: dict[str, Any]) -> dict[str, Any]:
        tokens = self._prompts.pop(name, None)
        if self._cache.hierarchy.context.stages is not None:
            return {"state": messages.REFUSED, "why": NO_STAGES}
        if not self._cache.weights.is_named:
            return {"state": messages.REFUSED, "why": NO_NAME}
        session, tenant = message["session"], message["tenant"]
        found: list[SessionPrompt] = []
        if session is None:
            if tokens is None:
                return {"state": messages.UNKNOWN}
            key = tree_key(message["key"], message["lora_id"])
            tokens = as_named(tokens, key, self._cache.hierarchy.context)
            found.append(SessionPrompt(key, tokens))
        elif self._sessions is None:
            return {"state": messages.REFUSED, "why": NO_SESSIONS}
        else:
            found += self._sessions.find(session, tenant)
        hierarchy = self._cache.hierarchy
        size = hierarchy.context.page_size
        prompts = [Prompt.of(hierarchy.root(one.tree_key), one.tokens, size) for one in found]
        action = message["action"]
        order = Order(action, Tier[message["tier"]], tenant or "", message["seconds"])
        self._control.begin(name, order, prompts)
        self._cache.parts.metrics.ordered(action)
        if action == "drop" and session is not None:
            self._forgets[name] = session, tenant
        return {"state": messages.MORE}

    def _round(self, name: str, *, is_late: bool) -> dict[str, Any]:
        try:
            outcome, waits = self._control.go_on(name, is_late=is_late)
        except KeyError:
            return {"state": messages.UNKNOWN}
        if outcome is None:
            return {"state": messages.WAITS if waits else messages.MORE}
        if name in self._forgets and self._sessions is not None:
            self._sessions.forget(*self._forgets.pop(name))
        return {"state": messages.DONE, "outcome": outcome}

    def _end(self, name: str) -> None:
        self._prompts.pop(name, None)
        self._forgets.pop(name, None)
        self._control.end(name)


def _disk_pages(cache: TieredPrefixCache) -> int:
    """Pages that the disk has room for, as far as this rank knows; the least of all ranks."""
    disk, context = cache.parts.disk_store, cache.hierarchy.context
    n_pages = 1 << 62  # another rank has it
    if disk is not None:
        n_pages = disk.capacity_bytes // context.page_format(Tier.DISK).slot_bytes
    if context.stages is not None:
        return 0  # no orders are taken
    (least,) = context.collective.minimum([n_pages])
    return least if cache.parts.has_disk else 0
