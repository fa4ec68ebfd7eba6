"""SGLang's running requests as an iteration policy sees them.

Nothing is done per request in an iteration in which everybody decodes: totals are kept, and a
request is touched when it joins, when it leaves, and when the policy is about to look at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.plugin.decode.gangs import gangs_of
from tiered_kv.plugin.decode.swap_out import can_swap
from tiered_kv.plugin.requests.view import terms_of
from tiered_kv.plugin.upstream.current import request_kv
from tiered_kv.scheduler.iteration_policy import RunningRequest, RunningTotals

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclass(slots=True)
class _Entry:
    """One request, with what it was when it was last touched."""

    request: RunningRequest
    n_all: int
    """Iterations of everybody that its `context_tokens` and `last_token_s` account for."""
    first_token_s: float


class RunningRequests:
    """Those in SGLang's running batch, parked or not."""

    def __init__(self, saved_tokens: Callable[[], int] | None = None) -> None:
        """saved_tokens: KV tokens that cascade attention had the last decode not read; None: it is
        not in use, and gangs are nobody's concern.
        """
        self.is_cascade = saved_tokens is not None
        self._saved_tokens = saved_tokens
        self._gangs_known_of: list[Req] | None = None
        self.totals = RunningTotals()
        self._entries: dict[Req, _Entry] = {}
        self._reqs: list[Req] | None = None
        self._by_id: dict[int, Req] = {}
        self._next_id = 0
        self._n_all = 0
        # Whoever decoded in the last iteration, and when it began.
        self._decoding: Sequence[Req] | None = None
        self._decided_s = 0.0

    # -- joining and leaving ------------------------------------------------------------------

    def keep_up(self, reqs: list[Req], now_s: float) -> None:
        """Before each iteration: `reqs` run now; SGLang makes a new list whenever that changes."""
        self.take_tokens(now_s)
        if reqs is self._reqs:
            return
        there = set(reqs)
        for req in self._entries.keys() - there:
            self._remove(req)
        for req in self._new(reqs, len(there) - len(self._entries)):
            self._add(req, now_s)
        self._reqs = reqs
        self.totals.shared_tokens_saved = 0

    def clear(self) -> None:
        """Nobody runs any more."""
        for req in list(self._entries):
            self._remove(req)
        self._reqs = self._gangs_known_of = self._decoding = None
        self.totals.n_parked = self.totals.shared_tokens_saved = 0

    def _new(self, reqs: list[Req], n_new: int) -> list[Req]:
        """The `n_new` of `reqs` that are not known yet, in order: they are near the end."""
        found: list[Req] = []
        for req in reversed(reqs) if n_new else ():
            if req not in self._entries:
                found.append(req)
                if len(found) == n_new:
                    break
        return found[::-1]

    def _add(self, req: Req, now_s: float) -> None:
        self._next_id += 1
        tokens = request_kv.committed_tokens(req) + 1
        request = RunningRequest(
            request_id=self._next_id,
            context_tokens=tokens,
            last_token_s=now_s,
            tbt_s=terms_of(req).slo.tbt_s,
        )
        self._entries[req] = _Entry(request, self._n_all, now_s)
        self._by_id[request.request_id] = req
        self.totals.add(request.tbt_s, tokens)

    def _remove(self, req: Req) -> None:
        entry = self._entries.pop(req)
        del self._by_id[entry.request.request_id]
        tokens = entry.request.context_tokens + self._n_all - entry.n_all
        self.totals.remove(entry.request.tbt_s, tokens)

    # -- iterations ---------------------------------------------------------------------------

    def everyone_decodes(self, now_s: float) -> None:
        """The iteration that begins at `now_s` is one of everybody."""
        self._decide(self._reqs, now_s)

    def some_decode(self, reqs: Sequence[Req], now_s: float) -> None:
        """The iteration that begins at `now_s` is one of `reqs`, who are not everybody."""
        self._decide([req for req in reqs if req in self._entries], now_s)

    def _decide(self, decoding: Sequence[Req] | None, now_s: float) -> None:
        self.take_tokens(now_s)
        self._decoding, self._decided_s = decoding, now_s

    def take_tokens(self, now_s: float) -> None:
        """The last iteration's tokens count as given when the next begins, of whatever kind."""
        decoding = self._decoding
        if decoding is None or now_s <= self._decided_s:
            return
        self._decoding = None
        totals = self.totals
        if decoding is self._reqs:
            self._n_all += 1
            totals.decoded(now_s)
            if self._saved_tokens is not None:
                totals.shared_tokens_saved = self._saved_tokens()
            return
        totals.n_parked = totals.n - len(decoding)
        totals.context_tokens += len(decoding)
        for req in decoding:
            entry = self._up_to_date(req)
            entry.request.context_tokens += 1
            entry.request.last_token_s = now_s

    def _up_to_date(self, req: Req) -> _Entry:
        entry = self._entries[req]
        if entry.n_all != self._n_all:
            entry.request.context_tokens += self._n_all - entry.n_all
            entry.request.last_token_s = max(entry.request.last_token_s, self.totals.decoded_s)
            entry.n_all = self._n_all
        return entry

    # -- looking ------------------------------------------------------------------------------

    def look(self, reqs: Iterable[Req]) -> list[RunningRequest]:
        """`reqs`, who run, brought up to date. A request that is to end must decode to do so."""
        self._find_gangs()
        requests = []
        for req in reqs:
            entry = self._up_to_date(req)
            request = entry.request
            request.can_park = req.to_finish is None and not req.finished()
            if request.tbt_s is not None:
                pace_s = len(req.output_ids) * request.tbt_s
                request.next_token_due_s = entry.first_token_s + pace_s
            requests.append(request)
        return requests

    def _find_gangs(self) -> None:
        """Whenever somebody came or went: who shares what with whom stays the same otherwise."""
        reqs = self._reqs
        if not self.is_cascade or reqs is None or reqs is self._gangs_known_of:
            return
        self._gangs_known_of = reqs
        for req, gang in zip(reqs, gangs_of(req.last_node for req in reqs), strict=True):
            request = self._entries[req].request
            request.gang, request.shared_tokens = gang or (None, 0)

    def measure(self, req: Req) -> None:
        """What making `req` leave would free, and whether that can be undone."""
        request = self._entries[req].request
        request.can_swap = can_swap(req)
        node: Node | None = req.last_node
        n_on_host = 0
        while node is not None and not node.is_root and node.pins(Tier.DEVICE) == 1:
            if node.state(Tier.HOST) is Residency.RESIDENT:
                n_on_host += node.n_tokens
            node = node.parent
        shared = 0 if node is None else node.end
        request.own_tokens = request.context_tokens - shared
        request.host_tokens = n_on_host

    def is_any_looser(self, tbt_s: float) -> bool:
        """Whether somebody who runs has a looser token objective, or none. O(n)."""
        entries = self._entries.values()
        return any((entry.request.tbt_s or math.inf) > tbt_s for entry in entries)

    def req(self, request_id: int) -> Req:
        """SGLang's request of that id, which runs."""
        return self._by_id[request_id]

    def request(self, req: Req) -> RunningRequest:
        """`req`, which runs, as it was when it was last touched."""
        return self._entries[req].request
