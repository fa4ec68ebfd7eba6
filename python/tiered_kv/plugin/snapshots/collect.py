"""Notes what a snapshot is made of, on the scheduler's thread, between two forward passes.

It must not keep the thread for a millisecond, however large the forest and long the queue
(benchmark/micro/snapshot.py). So it comes in two parts, each asked for by itself; everything in it
is bounded in number and in time, and nothing is computed that the HTTP server's process can compute
(`snapshot/schema.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from tiered_kv.core.ids import Tier
from tiered_kv.memory.demand import Expectation
from tiered_kv.plugin.cache.idle import cache_of
from tiered_kv.plugin.requests.view import QUEUED, is_probe, terms_of
from tiered_kv.scheduler.lifecycle import Phase
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import UrgentFirst
from tiered_kv.scheduler.slack import price
from tiered_kv.snapshot.allowance import PART_S, Allowance
from tiered_kv.snapshot.prefixes import PREFIXES_MAX, prefix_rows, totals, tree_rows
from tiered_kv.snapshot.requests import RUNNING_MAX, WAITING_MAX, Row, running_row, waiting_row

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache
    from tiered_kv.plugin.cache.watched import Watched
    from tiered_kv.plugin.queue.order import RequestOrder

#: By these ids of a request for SGLang's internal state a part of a snapshot is meant, in this
#: order: the requests name prefixes of the forest.
PARTS = ("tiered_kv_forest", "tiered_kv_requests")
#: Its name in the answer.
PART_KEY = "tiered_kv_part"
#: Of those who wait, so many rows are for those who cannot be in time, if there are as many.
LATE_MAX = WAITING_MAX // 3
#: So many of each are noted in any case.
PREFIXES_LEAST, REQUESTS_LEAST = 24, 4
#: When each must leave off, as a share of the time that a part may take.
WAITING_SHARE, RUNNING_SHARE = 0.5, 1.0


def answer(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """AROUND `Scheduler.get_internal_state`. Every rank comes here; the first one is heard."""
    if recv_req.rid not in PARTS:
        return original(scheduler, recv_req)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    cache = cache_of(scheduler)
    watched = None if cache is None else cache.parts.watched
    if cache is None or watched is None:
        return GetInternalStateReqOutput(internal_state={})
    part = Part(scheduler, cache, watched)
    noted = part.forest() if recv_req.rid == PARTS[0] else part.requests()
    return GetInternalStateReqOutput(internal_state={PART_KEY: noted})


class Part:
    """One look at one scheduler. Both parts are plain values, as msgpack takes them;
    `snapshot/schema.py` says what they mean."""

    def __init__(self, scheduler: Any, cache: TieredPrefixCache, watched: Watched) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._watched = watched
        self._order: RequestOrder | None = getattr(scheduler, "tiered_kv_order", None)
        self._now_s = time.perf_counter()
        self._allowance = Allowance(time.thread_time, PART_S)

    def forest(self) -> dict[str, Any]:
        """The prefixes, the tiers, and what moves between them."""
        context, watched = self._cache.hierarchy.context, self._watched
        nodes = watched.sizes.largest(PREFIXES_MAX)
        args = self._scheduler.server_args
        rows = prefix_rows(
            self._allowance.spend(nodes, 1.0, PREFIXES_LEAST),
            watched.sizes,
            watched.ticks,
            self._now_s,
            next_use=self._next_use(),
            text_tokens=args.tiered_kv_view_text_tokens,
        )
        nodes = nodes[: len(rows)]
        watched.shown = frozenset(node.node_id for node in nodes)
        return {
            "page_tokens": context.page_size,
            "policy": args.schedule_policy if self._order is None else args.tiered_kv_policy,
            "totals": totals(context.forest, watched.sizes),
            "prefixes": rows,
            "trees": tree_rows(nodes, watched.sizes),
            "tiers": self._tiers(),
            "edges": self._edges(),
            "hits": watched.hits,
            "forest_us": self._spent_us(),
        }

    def requests(self) -> dict[str, Any]:
        """Who waits and who runs."""
        waiting = self._waiting()
        return {"waiting": waiting, **self._running(), "requests_us": self._spent_us()}

    def _spent_us(self) -> int:
        return round(self._allowance.spent_s() * 1e6)

    def _next_use(self) -> Mapping[int, Expectation]:
        return {} if self._order is None else self._order.foretold.told

    # -- the tiers ----------------------------------------------------------------------------

    def _tiers(self) -> list[tuple[int, int, int | None, str]]:
        """(tier, tokens it has room for or 0 if nobody knows, tokens it holds if that is not for
        the forest to say, what is the matter with it: "" if nothing)."""
        cache = self._cache
        context, disk = cache.hierarchy.context, cache.parts.disk_store
        page_size = context.page_size
        rows: list[tuple[int, int, int | None, str]] = [
            (Tier.DEVICE, cache.token_to_kv_pool_allocator.size, None, ""),
            (Tier.HOST, context.host.n_pages * page_size, None, ""),
        ]
        if disk is not None:
            stats = disk.stats()
            most_pages = disk.capacity_bytes // context.page_format(Tier.DISK).slot_bytes
            state = "takes no writes" if stats.degraded else ""
            rows.append((Tier.DISK, most_pages * page_size, stats.pages * page_size, state))
        link = None if cache.parts.store is None else cache.parts.store.link
        if link is not None:
            rows.append((Tier.STORE, 0, None, "does not answer" if link.is_degraded else ""))
        return rows

    def _edges(self) -> list[tuple[int, int, int, int, int]]:
        """(source, target, bytes moved in all, bytes asked for and not there yet, transfers)."""
        hierarchy = self._cache.hierarchy
        queues: list[tuple[Tier, Tier, Any]] = [
            (Tier.DEVICE, Tier.HOST, hierarchy.write_back.to_host),
            (Tier.HOST, Tier.DEVICE, hierarchy.load_back.queue),
        ]
        for cold in hierarchy.colds:
            queues.append((Tier.HOST, cold.tier, cold.writes.queue))
            queues.append((cold.tier, Tier.HOST, cold.reads))
        context = hierarchy.context
        return [
            (
                source,
                target,
                context.moved_bytes.get((source, target), 0),
                queue.pages_in_flight * context.page_format(max(source, target)).page_bytes,
                queue.in_flight,
            )
            for source, target, queue in queues
        ]

    # -- the requests -------------------------------------------------------------------------

    def _waiting(self) -> dict[str, Any]:
        order = self._order
        if order is None:
            waiting = self._scheduler.waiting_queue
            rows = [self._plain_row(req) for req in islice(waiting, WAITING_MAX)]
            return {"count": len(waiting), "held": 0, "in_time": None, "rows": rows}
        queue, policy = order.queue, order.policy
        in_time: int | None = None
        starts: dict[QueuedRequest, float | None] = {}
        if isinstance(policy, UrgentFirst):
            in_time = policy.n_in_time()
            tightest = policy.tightest(WAITING_MAX)
            late = policy.not_in_time(max(LATE_MAX, WAITING_MAX - len(tightest)))
            starts = dict([*late, *tightest[: WAITING_MAX - len(late)]])
        for request in islice(queue.waiting, WAITING_MAX):
            if len(starts) >= WAITING_MAX:
                break
            if request not in starts:
                work_s = price(request, order.costs).work_s
                starts[request] = request.deadline_s - work_s
        rows = [
            waiting_row(
                queue.req(request.request_id).rid,
                request,
                start_s,
                self._now_s,
                self._watched.shown,
            )
            for request, start_s in self._allowance.spend(
                starts.items(), WAITING_SHARE, REQUESTS_LEAST
            )
        ]
        return {
            "count": len(queue.waiting),
            "held": len(queue.held),
            "in_time": in_time,
            "rows": rows,
        }

    def _running(self) -> dict[str, Any]:
        """Those who decode, those of them who are parked, and those whose prompt is computed."""
        scheduler = self._scheduler
        running: list[Req] = scheduler.running_batch.reqs
        n_parked = 0 if self._order is None else self._order.queue.lives.n_parked
        prefilling = self._prefilling()
        rows: dict[str, list[Row]] = {"running": [], "parked": [], "prefilling": []}
        for req in self._spend(running, RUNNING_MAX):
            is_parked = n_parked and self._is_parked(req)
            rows["parked" if is_parked else "running"].append(self._row(req))
        rows["prefilling"] = [self._row(req) for req in self._spend(prefilling, RUNNING_MAX // 4)]
        counts = {
            "running": len(running) - n_parked,
            "parked": n_parked,
            "prefilling": len(prefilling),
        }
        return {kind: {"count": counts[kind], "rows": rows[kind]} for kind in rows}

    def _spend(self, reqs: Iterable[Req], most: int) -> Iterator[Req]:
        return self._allowance.spend(islice(reqs, most), RUNNING_SHARE, REQUESTS_LEAST)

    def _prefilling(self) -> list[Req]:
        """Those of the last prefill, which are not among the running yet, and one that goes on."""
        last, unfinished = self._scheduler.last_batch, self._scheduler.chunked_req
        found: dict[Req, None] = {}
        if last is not None and last.forward_mode.is_extend():
            found = dict.fromkeys(islice(_alive(last.reqs), RUNNING_MAX))
        if unfinished is not None:
            found[unfinished] = None
        return list(found)

    def _is_parked(self, req: Req) -> bool:
        if self._order is None or not hasattr(req, QUEUED):
            return False
        request_id = getattr(req, QUEUED).request_id
        return self._order.queue.lives.phase(request_id) is Phase.PARKED

    def _row(self, req: Req) -> Row:
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is None:
            return self._plain_row(req)
        return running_row(
            req.rid,
            queued,
            len(req.output_ids),
            req.cached_tokens,
            self._now_s,
            self._watched.shown,
            req.last_node,
        )

    def _plain_row(self, req: Req) -> Row:
        """Of one whom no policy of ours knows."""
        terms = terms_of(req)
        request = QueuedRequest(
            request_id=0,
            arrival_s=req.time_stats.wait_queue_entry_time or self._now_s,
            root=self._cache.root_node,
            tokens=req.origin_input_ids,
            prompt_tokens=len(req.origin_input_ids),
            max_new_tokens=0,
            slo=terms.slo,
            tenant=terms.tenant,
        )
        return running_row(
            req.rid,
            request,
            len(req.output_ids),
            req.cached_tokens,
            self._now_s,
            self._watched.shown,
            req.last_node,
        )


def _alive(reqs: Iterable[Req]) -> Iterable[Req]:
    return (req for req in reqs if not req.finished() and not is_probe(req))
